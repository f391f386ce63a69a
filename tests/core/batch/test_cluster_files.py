"""The files for Slurm and Kubernetes in the docs: as many parts as they start, and options that exist."""

import re
import shlex
from pathlib import Path

from sprint_core.batch import __main__ as command_line

PAGE = (Path(__file__).resolve().parents[3] / "docs" / "batch.md").read_text(encoding="utf-8")


def parts(words: list[str], index: str) -> int:
    """N of the command's --shard K/N, with every K in the place of the scheduler's index."""
    start = words.index("sprint_core.batch") + 1
    count = int(command_line._arguments(words[start:]).shard.partition("/")[2])
    for number in range(count):
        shard = command_line._arguments([word.replace(index, str(number)) for word in words[start:]]).shard
        assert command_line._part(shard) == (number, count)
    return count


def test_the_slurm_array_has_every_part():
    script = re.search(r"```bash\n(.*?)```", PAGE, re.DOTALL)[1]
    words = shlex.split(next(line for line in script.splitlines() if line.startswith("srun ")))
    first, last = re.search(r"#SBATCH --array=(\d+)-(\d+)", script).groups()
    assert range(int(first), int(last) + 1) == range(parts(words, "$SLURM_ARRAY_TASK_ID"))


def test_the_indexed_job_has_every_part():
    job = re.search(r"```yaml\n(.*?)```", PAGE, re.DOTALL)[1]
    words = [word.strip().strip('"') for word in re.search(r"command: \[(.*?)\]", job, re.DOTALL)[1].split(",")]
    assert "completionMode: Indexed" in job
    assert int(re.search(r"completions: (\d+)", job)[1]) == parts(words, "$(JOB_COMPLETION_INDEX)")
