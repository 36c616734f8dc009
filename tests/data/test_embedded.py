"""What comes with the package: corpus, tokenizers, models."""

import importlib.util
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from lightning_sea.data import GLUEDataModule, TextDataModule, load_tokenizer
from lightning_sea.data.embedded import CORPUS, resolve_model
from lightning_sea.data.files import SPLITS, read_rows
from lightning_sea.data.glue_tasks import TASKS, TOPICS

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "teachers" / "make_excerpt.py"
TEXT = "Ångström — 10⁻¹⁰ m,  twice  spaced;\n\tand “quoted” 日本語 🙂"


def corpus(split: str) -> list[dict]:
    return [row for _, row in read_rows(CORPUS / f"{split}.jsonl.gz")]


def load_script():
    spec = importlib.util.spec_from_file_location("make_excerpt", SCRIPT)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    return script


def test_the_hash_of_the_title_puts_every_summary_in_its_split():
    """So no held-out summary is in the teachers' training text, which leaves out all titles of these places."""
    script = load_script()
    titles = set()
    for split in SPLITS:
        rows = corpus(split)
        assert len(rows) > 300
        assert {script.split_of(row["title"]) for row in rows} == {split}
        assert {row["topic"] for row in rows} == {*TOPICS, "Uncategorized"}
        titles |= {row["title"] for row in rows}
    assert len(titles) == sum(len(corpus(split)) for split in SPLITS)
    assert "CC BY-SA 4.0" in (CORPUS / "ATTRIBUTION.md").read_text()


def test_the_script_keeps_held_out_summaries_from_the_teachers(tmp_path, monkeypatch):
    script = load_script()
    rows = [{"title": f"title {number}", "topic": "Arts", "text": f"text {number}"} for number in range(300)]
    script.write_rows(tmp_path / "all.jsonl.gz", rows)
    monkeypatch.setattr(script, "CORPUS", tmp_path / "corpus")
    train_file = tmp_path / "train.jsonl.gz"
    monkeypatch.setattr(
        "sys.argv", ["make_excerpt.py", str(tmp_path / "all.jsonl.gz"), "--train-file", str(train_file)]
    )
    script.main()
    found = {path.name: [row for _, row in read_rows(path)] for path in (tmp_path / "corpus").iterdir()}
    held_out = found["validation.jsonl.gz"] + found["test.jsonl.gz"]
    training = [row for _, row in read_rows(train_file)]
    assert len(held_out) > 10
    assert sorted(row["title"] for row in held_out + training) == sorted(row["title"] for row in rows)
    assert all(row in training for row in found["train.jsonl.gz"])


def test_tokenizers_share_a_vocabulary_and_lose_nothing():
    lm, classifier = load_tokenizer("embedded:lm"), load_tokenizer("embedded:classifier")
    assert lm.get_vocab() == classifier.get_vocab()
    assert len(lm) == 4096
    for tokenizer in (lm, classifier):
        ids = tokenizer(TEXT, add_special_tokens=False)["input_ids"]
        assert tokenizer.unk_token_id not in ids
        assert tokenizer.decode(ids) == TEXT
    assert lm(TEXT)["input_ids"] == lm(TEXT, add_special_tokens=False)["input_ids"]
    pair = classifier("a", "b")
    ends = {"start": classifier.cls_token_id, "end": classifier.sep_token_id}
    assert [pair["input_ids"][place] for place in (0, 2, 4)] == [ends["start"], ends["end"], ends["end"]]
    assert pair["token_type_ids"] == [0, 0, 0, 1, 1]


def test_the_language_model_is_trained(cache_dir):
    model, report = AutoModelForCausalLM.from_pretrained(resolve_model("embedded:lm"), output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert model.dtype == torch.float32
    assert 1_000_000 < model.num_parameters() < 2_000_000
    data = TextDataModule("embedded:lm", "embedded", seq_len=256, cache_dir=cache_dir)
    data.setup("test")
    batch = next(iter(data.test_dataloader()[0]))
    with torch.no_grad():
        loss = model(**batch, use_cache=False).loss
    assert loss.exp() < 80  # of 4096 tokens; it reaches 42 on the whole validation split


def test_the_classifier_is_trained(cache_dir):
    path = resolve_model("embedded:classifier")
    model, report = AutoModelForSequenceClassification.from_pretrained(path, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert model.dtype == torch.float32
    assert 1_000_000 < model.num_parameters() < 2_000_000
    assert tuple(model.config.id2label[index] for index in range(model.num_labels)) == TOPICS
    data = GLUEDataModule("topics", "embedded:classifier", "embedded", batch_size=64, cache_dir=cache_dir)
    data.setup("test")
    batch = next(iter(data.test_dataloader()[0]))
    labels = batch.pop("labels")
    batch.pop("idx")
    with torch.no_grad():
        accuracy = (model(**batch).logits.argmax(-1) == labels).float().mean()
    assert accuracy > 0.7  # it reaches 0.84 on the whole split


def test_topics_leave_out_what_has_no_topic(cache_dir):
    data = GLUEDataModule("topics", "embedded:classifier", "embedded", cache_dir=cache_dir)
    data.setup("test")
    labelled = [row for row in corpus("test") if row["topic"] != "Uncategorized"]
    assert len(data.splits["test"]) == len(labelled)
    assert [TASKS["topics"].labels[label] for label in data.splits["test"]["labels"]] == [
        row["topic"] for row in labelled
    ]


def test_names_of_models():
    assert resolve_model("bert-base-uncased") == "bert-base-uncased"
    assert Path(resolve_model("embedded:lm"), "config.json").is_file()
    with pytest.raises(ValueError, match="no embedded model 'embedded:gpt'; expected one of embedded:classifier, emb"):
        resolve_model("embedded:gpt")
