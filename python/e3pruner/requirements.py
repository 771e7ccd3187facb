"""The packages of the extra `hf`, by the modules that they hold: importing this says the command that installs them.
And the modules of the other extras, which `require` says the same of."""

import sys
from importlib.util import find_spec
from pathlib import Path

PACKAGES = {
    "accelerate": "accelerate",
    "filelock": "filelock",
    "huggingface-hub": "huggingface_hub",
    "jinja2": "jinja2",
    "matplotlib": "matplotlib",
    "numpy": "numpy",
    "psutil": "psutil",
    "pyyaml": "yaml",
    "rich": "rich",
    "safetensors": "safetensors",
    "transformers": "transformers",
    "typer": "typer",
}

EXTRAS = {"datasets": "trl", "gguf": "demo", "lm_eval": "harness", "peft": "lora"}

if missing := [name for name, module in PACKAGES.items() if find_spec(module) is None]:
    message = f"e3pruner needs {', '.join(missing)}: pip install 'e3kernels[hf]'"
    if Path(sys.argv[0]).stem == "e3":  # the command shows no traceback
        sys.exit(message)
    raise ImportError(message)


def require(module: str) -> None:
    """Raises ModuleNotFoundError, which says the command that installs it, where `module` of `EXTRAS` is missing."""
    if find_spec(module) is None:
        message = f"the package {module} is not installed: pip install 'e3kernels[{EXTRAS[module]}]'"
        raise ModuleNotFoundError(message, name=module)
