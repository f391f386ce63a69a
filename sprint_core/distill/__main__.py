"""python -m sprint_core.distill --recipe demo --stage all --out DIR [--set stage.key=value ...]"""

import argparse
import json
import logging
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from . import demo
from .recipes import Schedule, override

log = logging.getLogger(__name__)


def _schedules(settings: Sequence[str]) -> dict[str, Schedule]:
    """The demo's schedules with the command line's settings. Raises ValueError."""
    schedules = dict(demo.SCHEDULES)
    for setting in settings:
        name, _, value = setting.partition("=")
        stage, _, key = name.partition(".")
        if stage not in schedules or not key or not value:
            raise ValueError(f"--set {setting}: write it as STAGE.KEY=VALUE, with a stage of {', '.join(schedules)}")
        schedules[stage] = override(schedules[stage], {key: value})
    return schedules


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m sprint_core.distill", description=__doc__)
    parser.add_argument("--recipe", choices=["demo"], default="demo")
    parser.add_argument("--stage", choices=[*demo.STAGES, "all"], default="all", help="the last one to run")
    parser.add_argument("--out", type=Path, required=True, help="folder of this run; the same again resumes it")
    parser.add_argument("--autoencoder", type=Path, metavar="FILE", help="start from this DC-AE, trained before")
    parser.add_argument("--pool", type=int, default=demo.POOL, help="training scenes")
    parser.add_argument("--set", action="append", default=[], metavar="STAGE.KEY=VALUE", dest="settings")
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    started = time.perf_counter()
    try:
        run = demo.Demo(args.out, _schedules(args.settings), args.pool, args.autoencoder)
        command = " ".join(["python", "-m", "sprint_core.distill", *(argv if argv is not None else sys.argv[1:])])
        files = []
        if args.stage in ("autoencoder", "decoder"):
            files = run.export_autoencoder(args.out, command)
        elif args.stage == "teacher":
            run.teacher()
        elif args.stage == "distill":
            run.student()
        else:
            files = run.export(args.out, command)
    except (ValueError, OSError) as error:
        log.error("error: %s", error)
        return 1
    tqdm.write(json.dumps({"files": [str(path) for path in files], "seconds": round(time.perf_counter() - started, 1)}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
