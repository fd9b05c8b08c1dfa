"""Run by `hostile.bounded`: opens and plans folders, and prints for each a line of JSON.

    python hostile_side.py FOLDER …

``said`` is the refusal, empty where there is none; ``peak`` the most bytes resident so far.
"""

import json
import re
import sys
from pathlib import Path

from llamaconv import RefusedError, make_plan, open_checkpoint

for folder in sys.argv[1:]:
    try:
        make_plan(open_checkpoint(folder)).raise_for_errors()
        said = ""
    except RefusedError as error:
        said = str(error)
    # Of this process; ru_maxrss begins with what the tests' own process has, of which it is a fork.
    status = Path("/proc/self/status").read_text()
    peak = int(re.findall(r"VmHWM:\s*(\d+) kB", status)[0]) * 1024
    print(json.dumps({"said": said, "peak": peak}), flush=True)
