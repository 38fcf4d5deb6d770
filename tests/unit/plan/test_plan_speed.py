"""A plan answers at once: it imports no torch, transformers or deepspeed."""

from __future__ import annotations

import json
import subprocess
import sys

from plan_recipes import BASE

PROGRAM = """
import json, sys, time
start = time.process_time()  # of its own work: other tests may be running
from ds_train.config.load import validate
from ds_train.plan.make import make_plan
from ds_train.plan.topology import Cluster
tree = json.loads(sys.argv[1])
tree["deepspeed"] = {"memory_breakdown": True}  # a raw key: DeepSpeed's source is read too
run = validate(tree)
imported = time.process_time()
make_plan(run, Cluster(2, 2, "cpu"))
planned = time.process_time()
heavy = [name for name in ("torch", "transformers", "deepspeed", "datasets", "numpy") if name in sys.modules]
print(json.dumps([imported - start, planned - imported, heavy]))
"""


def test_a_plan_takes_no_time_and_imports_nothing_heavy() -> None:
    ended = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps(BASE)], capture_output=True, text=True, timeout=60, check=True
    )
    importing, planning, heavy = json.loads(ended.stdout)
    assert heavy == []
    # Half a second each is several times what they take.
    assert importing + planning < 1.0
