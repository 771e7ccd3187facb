from pathlib import Path

ADAPTER_CONFIG = "adapter_config.json"


def prune_adapter(folder: Path, plan, out: Path) -> Path:
    raise NotImplementedError
