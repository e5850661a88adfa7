"""Can the project be set up on this machine? If not, ends with a message that says what is missing."""

import os
import shutil
import sys
import sysconfig

problems = []
if sys.version_info < (3, 10):  # noqa: UP036  (an older Python is what this looks for)
    problems.append(
        f"Python 3.10 or newer is needed; {sys.executable} is {sys.version_info[0]}.{sys.version_info[1]}. "
        "Name another one: make PYTHON=python3.12 ..."
    )
try:
    import ensurepip  # noqa: F401
    import venv  # noqa: F401
except ImportError as error:
    problems.append(f"{sys.executable} cannot make a venv ({error}): on Debian or Ubuntu, apt-get install python3-venv")
compiler = os.environ.get("CXX") or "g++"
if shutil.which(compiler.split()[0]) is None:
    problems.append(f"Inductor needs a C++ compiler, and there is no {compiler}: apt-get install g++, or set CXX")
header = os.path.join(sysconfig.get_path("include") or "", "Python.h")
if not os.path.exists(header):
    problems.append(f"Inductor needs Python's headers, and there is no {header}: apt-get install python3-dev")
if problems:
    sys.exit("\n".join("error: " + problem for problem in problems))
