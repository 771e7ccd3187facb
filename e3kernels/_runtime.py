"""The name of the compiled module, of which there is one file per torch and Python: importing this gives that one."""

import sys

from e3kernels.runtime_module import load

sys.modules[__name__] = load()
