"""Files of prompts: what each kind says, and one sentence for what is wrong, before anything is made of it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from processes import ROOT
from pyarrow import Table, parquet

from sprint_core.batch import plan, rows
from sprint_core.batch.rows import Defaults, Row

TWO = [
    {"prompt": "a cat, asleep", "id": "one", "seed": 7, "steps": 1, "guidance": 2.5, "width": 96, "height": 64},
    {"prompt": "zwei Käfer 🐞", "negative": "a dog", "image": "a.png", "control": "b.png"},
]
WANTED = [
    Row(0, "one", "a cat, asleep", 7, 1, 2.5, 96, 64),
    Row(1, "000000001", "zwei Käfer 🐞", 6, 4, 4.0, None, None, "a dog", "a.png", "b.png"),
]
DEFAULTS = Defaults(seed=5, steps=4, guidance=4.0)


def write(path: Path, table: list[dict]) -> Path:
    names = list(dict.fromkeys(name for row in table for name in row))
    if path.suffix == ".jsonl":
        path.write_text("\n\n".join(json.dumps(row) for row in table) + "\n")
    elif path.suffix == ".parquet":
        parquet.write_table(Table.from_pylist([{name: row.get(name) for name in names} for row in table]), path)
    else:
        lines = [",".join(f'"{row.get(name, "")}"' for name in names) for row in table]
        path.write_text("\ufeff" + "\r\n".join([",".join(names), *lines]), encoding="utf-8")
    return path


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_kinds_say_the_same(tmp_path, kind):
    assert list(rows.read(write(tmp_path / f"prompts.{kind}", TWO), DEFAULTS)) == WANTED


def test_text_is_a_prompt_on_each_line(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text('a "red" cat\n\n  two, dogs\u2028here \n')
    read = list(rows.read(file, Defaults(seed=2**63 - 1, width=64, height=96)))
    assert [(row.number, row.id, row.prompt, row.seed) for row in read] == [
        (0, "000000000", 'a "red" cat', 2**63 - 1),
        (1, "000000001", "two, dogs\u2028here", 0),
    ]
    assert {(row.width, row.height, row.steps, row.guidance) for row in read} == {(64, 96, None, None)}


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.jsonl", '{"prompt": "a"}\n\n{"prompt": ', "a.jsonl, line 3: not JSON"),
        ("a.jsonl", '{"prompt": "a"}\n["b"]', "line 2: expected an object"),
        ("a.jsonl", '{"prompt": "a", "sed": 1}', "line 1: unknown column sed; there are prompt, id, seed"),
        ("a.jsonl", '{"text": "a"}', "line 1: unknown column text"),
        ("a.jsonl", '{"id": "a"}', 'line 1: no column "prompt", only id'),
        ("a.jsonl", '{"prompt": "a"}\n{"prompt": " "}', "line 2: no prompt"),
        ("a.jsonl", '{"prompt": 3}', "line 1: expected text, not 3"),
        ("a.jsonl", '{"prompt": "\\ud83d"}', "line 1: its text is neither UTF-8"),
        ("a.jsonl", '{"prompt": "a", "seed": true}', "line 1: seed is True: expected a whole number"),
        ("a.jsonl", '{"prompt": "a", "seed": 9223372036854775808}', "line 1: seed is 9223372036854775808"),
        ("a.jsonl", '{"prompt": "a", "steps": 1.5}', "line 1: steps is 1.5"),
        ("a.jsonl", '{"prompt": "a", "guidance": NaN}', "line 1: guidance is nan: expected a number"),
        ("a.jsonl", '{"prompt": "a", "id": "a.b"}', "line 1: id is 'a.b': it names files"),
        ("a.jsonl", '{"prompt": "a", "id": "../b"}', "line 1: id is '../b'"),
        (
            "a.jsonl",
            '{"prompt": "a", "id": "x"}\n{"prompt": "b", "id": "x"}',
            "line 2: the id x is also that of line 1",
        ),
        ("a.csv", "prompt,size\na,3\n", "a.csv, line 1: unknown column size"),
        ("a.csv", "id\n3\n", 'line 1: no column "prompt", only id'),
        (
            "a.csv",
            "prompt,id\na,1\nb, c,2\n",
            "line 3: not as many values as there are columns (prompt, id); put those",
        ),
        ("a.csv", "prompt,id\na\n", "line 2: not as many values"),
        ("a.csv", 'prompt,id\n"a"b,1\n', "line 2: not CSV"),
        ("a.csv", "prompt,prompt\na,b\n", "a column stands there twice"),
        ("a.csv", "prompt,seed\na,-1\n", "line 2: seed is '-1'"),
        ("a.csv", "", "line 1: no column"),
        ("a.txt", "\n \n", "a.txt: no prompts in it"),
        ("a.txt", b"a\xff", "a.txt: neither UTF-8 nor text with a byte order mark"),
        ("a.json", "{}", "a.json: name it .txt, .jsonl, .csv or .parquet"),
        ("a.parquet", "no table", "a.parquet: not a parquet file that can be read"),
    ],
)
def test_what_is_wrong_is_named_with_its_row(tmp_path, name, text, message):
    (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError) as error:
        list(rows.read(tmp_path / name, Defaults()))
    assert message in str(error.value) and "\n" not in str(error.value)


def test_columns_of_a_table_are_checked(tmp_path):
    file = write(tmp_path / "a.parquet", [{"prompt": "a"}, {"prompt": None}])
    with pytest.raises(ValueError, match=r"a.parquet, row 1: no prompt"):
        list(rows.read(file, Defaults()))
    with pytest.raises(ValueError, match=r"a.parquet: unknown column caption"):
        list(rows.read(write(tmp_path / "a.parquet", [{"caption": "a"}]), Defaults()))


def test_without_pyarrow_its_command_is_named(tmp_path):
    file = write(tmp_path / "a.parquet", [{"prompt": "a"}])
    code = f"""
import sys
sys.modules["pyarrow"] = None
from sprint_core.batch import __main__
for words in ({str(file)!r}, "--out", "o"), ("a.txt", "--out", "o", "--format", "parquet"):
    assert __main__.main(words) == 1
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    lines = done.stderr.splitlines()
    assert done.returncode == 0 and len(lines) == 2, done.stderr
    assert all("parquet files need pyarrow; install it with: pip install --group parquet" in line for line in lines)


# --- shards and batches -------------------------------------------------------------------------------


def sized(count: int) -> list[Row]:
    return [Row(i, str(i), "a", i, width=64 if i % 3 else 96, height=64) for i in range(count)]


def test_batches_have_one_size_and_the_rows_order():
    cut = plan.batches(sized(12), 3)
    assert [[row.number for row in batch] for batch in cut] == [[0, 3, 6], [9], [1, 2, 4], [5, 7, 8], [10, 11]]
    unlike = [Row(0, "0", "a", 0), Row(1, "1", "a", 0, negative="b"), Row(2, "2", "a", 0, steps=1)]
    unlike += [Row(3, "3", "a", 0, guidance=2.0), Row(4, "4", "a", 0, image="c"), Row(5, "5", "a", 0, control="c")]
    assert [len(batch) for batch in plan.batches(unlike, 8)] == [1] * 6


@pytest.mark.parametrize(
    ("count", "buckets", "batch", "wanted"),
    [(1, 1, 8, 8), (64, 1, 8, 8), (64, 4, 8, 32), (2048, 1, 8, 32), (10**6, 1, 8, 512), (10**6, 33, 30, 540)],
)
def test_rows_of_a_shard(count, buckets, batch, wanted):
    assert plan.default_shard_rows(count, buckets, batch) == wanted


def test_a_plan_gives_back_its_rows():
    made = plan.make(iter(sized(20)), 4, 8)
    assert made.numbers == range(3) and made.count([0, 2]) == 12 and made.count(made.numbers) == 20
    assert [row for shard in made.numbers for row in made.rows(shard)] == sized(20)
    assert made.digest == plan.make(iter(sized(20)), 2, 4).digest != plan.make(iter(sized(21)), 4, 8).digest
