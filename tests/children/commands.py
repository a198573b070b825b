"""Commands one after the other in the processes of one torchrun: python commands.py COMMANDS.json FOLDER.

Each process leaves FOLDER/rank.json: exit code, stdout and stderr of each command.
"""

import contextlib
import io
import json
import os
import sys
from pathlib import Path

from fastvae.cli import main

found = []
for number, arguments in enumerate(json.loads(Path(sys.argv[1]).read_text())):
    # what torchrun counts up where it starts anew: names of its store are not met twice
    os.environ["TORCHELASTIC_RESTART_COUNT"] = str(number)
    out, err, code = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        argv, sys.argv = sys.argv, ["fastvae", *arguments]
        try:
            main()
        except SystemExit as end:
            code = end.code
        sys.argv = argv
    found.append((code, out.getvalue(), err.getvalue()))
Path(sys.argv[2], f"{os.environ['RANK']}.json").write_text(json.dumps(found))
