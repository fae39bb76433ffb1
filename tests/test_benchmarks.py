"""The benchmark runs; nothing here asserts a speed."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.bench import Records, result_of, take_turns
from benchmarks.limit import throughput
from benchmarks.measure import ROOT, FailedError, measure, memory_of
from benchmarks.peers import PEERS, Job
from benchmarks.report import Results, growth_table, limit_lines, table, targets
from benchmarks.rows import Group, Row, Setting, inference, training
from benchmarks.synthetic import draw_images, random_weights
from cnnft.runs.run import Run

QUICK = (
    "--images=20", "--size=32", "--batch-size=8", "--epochs=2", "--finetune-epochs=1", "--copies=1",
    "--architecture=resnet10t", "--rounds=1", "--growth", "50", "100",
    "--peers", "tutorial", "timm-train",
)  # fmt: skip


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    folder = tmp_path_factory.mktemp("bench")
    draw_images(folder / "train", 12, size=(60, 40))
    draw_images(folder / "val", 6, size=(60, 40), seed=1)
    weights = random_weights(folder / "weights", "resnet10t")
    return Job(str(folder), str(weights), epochs=1, batch_size=4, size=32)


def test_no_two_generated_files_are_equal(tmp_path):
    draw_images(tmp_path / "train", 50, classes=2, size=(8, 8))
    draw_images(tmp_path / "val", 50, classes=2, size=(8, 8), seed=1)
    assert len({path.read_bytes() for path in tmp_path.glob("*/*/*.jpg")}) == 100


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("name", ["tutorial", "timm-train", "timm-validate"])
def test_peers_tell_seconds_and_accuracy(job, name):
    outcome = PEERS[name](job)
    assert outcome.seconds > 0 and outcome.accuracy in {n / 6 for n in range(7)}


def test_the_limit_is_measured_for_every_kind(job):
    found = throughput(job, steps=1)
    assert {"plain", "forward", "tutorial", "cnnft"} <= found.keys()
    assert all(images > 0 for images in found.values())


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_process_is_measured_with_its_children():
    child = "import os; print(os.getpid(), flush=True); input()"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", parent], stdin=pipe, stdout=pipe) as process:
        alone = memory_of(int(process.stdout.readline()))
        together = memory_of(process.pid)
        process.communicate(b"\n")
    assert 0 < alone < together


def test_a_failure_is_told_in_its_last_line():
    with pytest.raises(FailedError, match=r"^no such thing$"):
        measure([sys.executable, "-c", "import sys; sys.exit('some\\nno such thing')"], {})


def test_a_row_takes_as_long_as_its_process(tmp_path):
    code = """import time; time.sleep(0.5); print('{"seconds": 0.0, "accuracy": 0.25}')"""
    row = Row("quick", (sys.executable, "-c", code), json.loads)
    result = result_of(row, Setting(tmp_path, tmp_path))
    assert result["seconds"] > 0.5 and result["accuracy"] == 0.25


def test_a_row_that_cannot_run_says_why(tmp_path):
    row = Row("no", (sys.executable, "-c", "import no_such_module"), json.loads)
    assert "no_such_module" in result_of(row, Setting(tmp_path, tmp_path))["absent"]


def records(row: str, seconds: list[float], **facts: object) -> list[dict[str, object]]:
    return [
        {"row": row, "round": n, "seconds": s, "memory": 10**8, **facts}
        for n, s in enumerate(seconds)
    ]


def group(kind: str, *names: str) -> Group:
    rows = tuple(Row(n, (), json.loads) for n in names)
    return Group(kind, "some network", names[0], rows, pretrained=False)


def test_ratios_are_of_the_same_round():
    found = Results(
        group(
            "feature-extractor",
            *("tutorial", "cnnft, K = 1", "fastai", "start-up of tutorial", "start-up of cnnft"),
        ),
        [
            *records("tutorial", [50, 100, 60], accuracy=0.9),
            *records("cnnft, K = 1", [2, 2, 2], accuracy=0.95, views=1),
            {"row": "fastai", "round": 0, "absent": "no module named fastai"},
            *records("start-up of tutorial", [10]),
            *records("start-up of cnnft", [1]),
        ],
    )
    assert found.ratios("cnnft, K = 1") == [25, 50, 30]
    text = table(found, lambda views: 25.0 / views)
    assert "| cnnft, K = 1 | 30.00 [25.00, 50.00] | 25.0 | 2.0 [2.0, 2.0] |" in text
    assert "| fastai | not there: no module named fastai |" in text
    verdicts = targets([found], lambda views: 25.0 / views, epochs=25)
    told = "30.00 [25.00, 50.00]; without start-up of both 40.00; the bound is 25.0 | met |"
    assert told in verdicts
    assert verdicts.count("not measured") == 1


def test_the_share_of_the_limit_and_what_the_ratio_is_made_of():
    reached = {"plain": 20.0, "plain, channels last": 25.0, "tutorial": 20.0, "cnnft": 25.0}
    found = Results(
        group("finetune", "tutorial", "cnnft", "limit"),
        [
            *records("tutorial", [50], accuracy=0.9, images_per_second=10.0),
            *records("cnnft", [20], accuracy=0.9, images_per_second=24.0),
            *records("limit", [5], throughput=reached),
        ],
    )
    assert limit_lines(found)[-1] == "| cnnft | 0.96 | 2.40 | 1.25 | 1.92 |"
    assert "| 0.96 | met |" in targets([found], float, epochs=25)


def test_growth_is_told_of_the_first():
    found = Results(
        group("growth", "10 images", "1,000 images"),
        [*records("10 images", [2.0]), *records("1,000 images", [5.0])],
    )
    assert growth_table(found).splitlines()[-1] == "| 1,000 images | 5.0 | 2.50 | 100 | 1.00 |"


def test_cnnft_has_every_flag_of_the_rows(job):
    setting = Setting(Path(job.data), Path(job.data), {"random": Path(job.weights)}, bf16=True)
    groups = [training(setting, "random", frozen, ["tutorial"]) for frozen in (True, False)]
    groups += inference(setting, "random")
    rows = [row for group in groups for row in group.rows]
    assert len(rows) > 15 and all(row.absent is None for row in rows)


def test_a_run_tells_its_facts(trained):
    scores = Run(trained).metrics().to_dict()
    told = json.dumps({"run": str(trained), "val": scores["val"], "train": scores["train"]})
    row = next(r for r in rows_of(trained) if r.name == "cnnft")
    facts = row.read(told)
    assert facts["accuracy"] == scores["val"]["accuracy"]
    assert facts["images_per_second"] > 0 and facts["views"] == Run(trained).config().views


def rows_of(folder: Path) -> tuple[Row, ...]:
    return training(Setting(folder, folder, {"n": folder}), "n", False, []).rows


def test_what_was_measured_is_not_measured_again(tmp_path):
    code = """print('{"seconds": 0.5, "accuracy": 0.25}')"""
    found = [Row("quick", (sys.executable, "-c", code), json.loads)]
    found.append(Row("not here", (sys.executable, "-c", "import no_such_module"), json.loads))
    turns = Group("predict", "some network", "quick", tuple(found))
    kept, settings = tmp_path / "results.jsonl", {"size": "32"}
    take_turns(turns, Setting(tmp_path, tmp_path), 2, Records(kept, settings))
    first = kept.read_text()
    assert [json.loads(line).get("row") for line in first.splitlines()] == [
        *(None, "quick", "not here", "quick"),
    ]
    take_turns(turns, Setting(tmp_path, tmp_path), 2, Records(kept, settings))
    assert kept.read_text() == first
    with pytest.raises(SystemExit, match="other settings"):
        Records(kept, {"size": "64"})


@pytest.mark.slow
def test_the_whole_command(tmp_path):
    def bench() -> subprocess.CompletedProcess[str]:
        results = f"--results={tmp_path / 'results.jsonl'}"
        command = [sys.executable, "-m", "benchmarks.bench", *QUICK, results]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done

    told = bench()
    assert "### Targets" in told.stdout and "failed" not in told.stdout
    again = bench()  # goes on where the first one stopped, which is at the end
    assert again.stdout == told.stdout and again.stderr == ""
