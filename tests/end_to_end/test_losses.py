"""`tpt losses` on two small runs, as a user gives it: what it writes agrees with transformers, and what does not belong together is refused."""

import json
import re
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from tests.support.browser import check_page
from tests.support.ranks import WarmRanks
from tests.support.train_runs import preprocess_corpus, write_train_config
from tpt_megatron.datasets import open_dataset
from tpt_megatron.demo import corpus


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory, warm_ranks: WarmRanks) -> Path:
    """A run `one/run` and the export `model` of another, longer one."""
    root = tmp_path_factory.mktemp("losses")
    preprocess_corpus(root)
    for name, steps in (("one", 3), ("other", 40)):
        ended = warm_ranks.run("train", str(write_train_config(root / name, root, steps=steps, optimizer={"learning_rate": 1e-2})))
        assert ended.returncode == 0, ended.stderr[-3000:]
    assert warm_ranks.run("convert", "export", str(root / "other/run"), str(root / "model")).returncode == 0
    return root


def write_config(work: Path, **changes: object) -> str:
    values = {
        "models": {"few steps": str(work / "one/run"), "more": str(work / "model")},
        "data": str(work / "datasets/append/train"),
        "reference": "few steps",
        "documents": 20,
        "show_documents": 3,
        "output": str(work / "losses"),
        **changes,
    }
    (work / "losses.yaml").write_text(yaml.safe_dump(values))
    return str(work / "losses.yaml")


def test_a_run_and_a_model_side_by_side(work: Path, warm_ranks: WarmRanks) -> None:
    (work / "losses/.model.killed/hf").mkdir(parents=True)  # as a run that was killed leaves it
    ended = warm_ranks.run("losses", write_config(work))
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert sorted(path.name for path in (work / "losses").iterdir()) == ["losses.html", "losses.json", "tokens.parquet"]
    rows, summary = pq.read_table(work / "losses/tokens.parquet").to_pylist(), json.loads((work / "losses/losses.json").read_text())
    assert len({row["document"] for row in rows}) == 20
    assert {row["part"] for row in rows} == {"document", "thinking"}
    last = [row for row in rows if row["document"] == rows[-1]["document"]]
    dataset = open_dataset(work / "datasets/append/train")
    ids = torch.tensor([[int(dataset.tokens[dataset.begin(last[0]["document"])]), *(row["token"] for row in last)]])
    with torch.no_grad():
        expected = torch.nn.functional.cross_entropy(AutoModelForCausalLM.from_pretrained(work / "model")(ids).logits[0, :-1], ids[0, 1:], reduction="none")
    assert np.abs(np.array([row["loss/more"] for row in last]) - expected.numpy()).max() < 1e-4
    for model in ("few steps", "more"):
        assert summary["means"]["all"]["all"][model] == pytest.approx(np.mean([row[f"loss/{model}"] for row in rows]), rel=1e-5)
    assert summary["means"]["all"]["all"]["more"] < summary["means"]["all"]["all"]["few steps"] - 1
    page = (work / "losses/losses.html").read_text()
    assert page.count('class="tokens"') == 3 * 2
    assert not re.search(r"""(src|href)=["']https?:|<script|<link""", page)
    check_page(work / "losses/losses.html", pictures=1)
    assert "difficulty 10" in ended.stdout


def test_mistakes_are_one_line(work: Path, warm_ranks: WarmRanks, tmp_path: Path) -> None:
    def refused(code: int, **changes: object) -> str:
        ended = warm_ranks.run("losses", write_config(work, output=str(tmp_path / "out"), **changes))
        assert ended.returncode == code
        assert "Traceback" not in ended.stderr
        assert not (tmp_path / "out/losses.json").exists()
        return ended.stderr.splitlines()[-1]

    assert "reference=best is none of the models few steps, more" in refused(2, reference="best")
    assert "nowhere: no such checkpoint folder" in refused(1, models={"few steps": str(tmp_path / "nowhere")})
    assert "nowhere.idx: no such file" in refused(1, data=str(tmp_path / "nowhere"))
    corpus.write_tokenizer(tmp_path / "words.json")
    (tmp_path / "words.jsonl").write_text('{"text": "Ann 3 , Bob 4"}\n')
    settings = {"input": f"{tmp_path}/words.jsonl", "output": f"{tmp_path}/words", "tokenizer": f"{tmp_path}/words.json", "arms": ["vanilla"]}
    (tmp_path / "words.yaml").write_text(yaml.safe_dump(settings))
    assert warm_ranks.run("preprocess", str(tmp_path / "words.yaml")).returncode == 0
    assert "its tokenizer is not the one that" in refused(1, data=str(tmp_path / "words/vanilla/train"))
