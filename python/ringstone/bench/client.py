"""The load generator in a process of its own: `python -m ringstone.bench.client`, the job as JSON on
standard input ({"call": "load" | "limit", "config": {...}}), its report on standard output."""

import json
import sys

from ringstone import _engine


def main() -> None:
    job = json.load(sys.stdin)
    run = {"load": _engine.load, "limit": _engine.limit}[job["call"]]
    try:
        answer = {"report": json.loads(run(json.dumps(job["config"])))}
    except _engine.EngineError as error:
        answer = {"code": error.code, "error": str(error)}
    json.dump(answer, sys.stdout)


if __name__ == "__main__":
    main()
