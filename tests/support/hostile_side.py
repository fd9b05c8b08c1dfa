"""Run by `hostile.bounded`: opens and plans folders, and prints for each a line of JSON.

    python hostile_side.py FOLDER …

``said`` is the refusal, empty where there is none; ``peak`` the most bytes resident so far.
"""

import json
import resource
import sys

from llamaconv import RefusedError, make_plan, open_checkpoint

for folder in sys.argv[1:]:
    try:
        make_plan(open_checkpoint(folder)).raise_for_errors()
        said = ""
    except RefusedError as error:
        said = str(error)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"said": said, "peak": peak}), flush=True)
