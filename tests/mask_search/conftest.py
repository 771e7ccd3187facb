"""Options that keep the methods of many steps short on a tiny model."""

QUICK = {
    "evolution": {"generations": 6},
    "policy-gradient": {"steps": 8},
    "straight-through": {"steps": 8},
    "clp": {"steps": 8},
}
