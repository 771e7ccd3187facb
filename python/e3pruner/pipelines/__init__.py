"""Search, prune, recover, judge: whole runs, each stage kept when it is done."""
