"""A plugin of pytest: writes each test's outcome as it comes into the file SPRINT_OUTCOMES, so that a limit loses none.

python -m pytest -p tools.gpu.outcomes ...      # lines of JSON: test, outcome, and of a failure its reason
"""

import json
import os
from pathlib import Path


class Outcomes:
    def __init__(self, file: Path):
        self.file = file

    def write(self, report) -> None:
        crash = getattr(report.longrepr, "reprcrash", None)
        reason = (crash.message if crash else str(report.longrepr)).strip().partition("\n")[0]
        line = {"test": report.nodeid, "outcome": report.outcome}
        line |= {"reason": reason[:200]} if report.failed else {}
        with open(self.file, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def pytest_runtest_logreport(self, report) -> None:
        if report.when == "call" or not report.passed:
            self.write(report)

    def pytest_collectreport(self, report) -> None:
        if report.failed:
            self.write(report)


def pytest_configure(config) -> None:
    file = os.environ.get("SPRINT_OUTCOMES")
    if file and not hasattr(config, "workerinput"):  # of xdist, whose workers report to this process
        config.pluginmanager.register(Outcomes(Path(file)))
