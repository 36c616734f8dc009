"""The data module of running text: documents, windows, and what it refuses."""

import gzip
import json
from pathlib import Path

import numpy
import pytest
from datasets import Dataset
from transformers import BertConfig, GPT2Config, LlamaConfig, MambaConfig, RobertaConfig

from lightning_sea.data import TextDataModule, check_positions
from lightning_sea.data import text as text_module
from lightning_sea.data.text import EvaluationWindows, articles

WIKITEXT = Path(__file__).parents[2] / "data" / "wikitext-2" / "wiki.valid.tokens"
EOS = 1


def words(*numbers: int) -> str:
    return " ".join(f"w{number}" for number in numbers)


def ids(*numbers: int) -> list[int]:
    return [number + 5 for number in numbers]


def module(tokenizer_dir, cache_dir, source, **options) -> TextDataModule:
    options = {"seq_len": 4, "batch_size": 1} | options
    return TextDataModule(
        tokenizer_dir, source if isinstance(source, dict) else str(source), cache_dir=cache_dir, **options
    )


def stream(data: TextDataModule, split: str = "validation") -> list[int]:
    data.setup("validate" if split == "validation" else "fit")
    return data.stream(split).tolist()


def test_blocks_by_hand():
    windows = EvaluationWindows(numpy.arange(10, 20, dtype=numpy.int32), seq_len=4, stride=4)
    assert [row["input_ids"].tolist() for row in windows] == [[10, 11, 12, 13], [14, 15, 16, 17], [18, 19]]
    assert [row["labels"].tolist() for row in windows] == [[10, 11, 12, 13], [14, 15, 16, 17], [18, 19]]


def test_strided_windows_by_hand():
    windows = EvaluationWindows(numpy.arange(10, 17, dtype=numpy.int32), seq_len=4, stride=2)
    assert [row["input_ids"].tolist() for row in windows] == [[10, 11, 12, 13], [12, 13, 14, 15], [14, 15, 16]]
    assert [row["labels"].tolist() for row in windows] == [[10, 11, 12, 13], [-100, -100, 14, 15], [-100, -100, 16]]


@pytest.mark.parametrize("num_tokens", [2, 7, 8, 9, 15, 16, 17, 40])
@pytest.mark.parametrize("stride", range(1, 9))
def test_every_token_counts_once(num_tokens, stride):
    seq_len = 8
    counted = []
    windows = EvaluationWindows(numpy.arange(num_tokens), seq_len, stride)
    for index in range(len(windows)):
        row = windows[index]
        predicted = row["labels"][1:] != -100  # a model predicts from the second position on
        counted += row["input_ids"][1:][predicted].tolist()
        if index and stride < seq_len:
            assert not predicted[: seq_len - stride - 1].any()  # at least so much context
    first_of_blocks = set(range(0, num_tokens, seq_len)) if stride == seq_len else {0}
    assert counted == [token for token in range(num_tokens) if token not in first_of_blocks]


def test_documents_end_with_the_token(tmp_path, tokenizer_dir, cache_dir):
    rows = [{"text": words(1, 2)}, {"text": " "}, {"text": words(3)}]
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    (tmp_path / "valid.jsonl.gz").write_bytes(gzip.compress(lines))
    assert stream(module(tokenizer_dir, cache_dir, tmp_path)) == [*ids(1, 2), EOS, *ids(3), EOS]


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("one.txt", "w1 w2\n\nw3\n", [*ids(1, 2, 3), EOS]),
        ("one.jsonl", '{"text": "w1"}\n{"text": "w2"}\n', [*ids(1), EOS, *ids(2), EOS]),
        ("one.csv", 'text\n"w1\nw2"\nw3\n', [*ids(1, 2), EOS, *ids(3), EOS]),
        (
            "one.tokens",
            " \n = w1 = \n \n w2 \n \n = w3 = \n \n w4 \n",
            [2, *ids(1), 2, *ids(2), EOS, 2, *ids(3), 2, *ids(4), EOS],
        ),
    ],
)
def test_one_file_of_each_kind(tmp_path, tokenizer_dir, cache_dir, name, content, expected):
    (tmp_path / name).write_text(content)
    assert stream(module(tokenizer_dir, cache_dir, tmp_path / name)) == expected


def test_a_folder_in_several_files(tmp_path, tokenizer_dir, cache_dir):
    for name, number in [("corpus.train.1.txt", 1), ("corpus.train.2.txt", 2), ("corpus.dev.txt", 3), ("notes.txt", 4)]:
        (tmp_path / name).write_text(words(*[number] * 5))
    data = module(tokenizer_dir, cache_dir, tmp_path)
    assert stream(data, "train") == [*ids(*[1] * 5), EOS, *ids(*[2] * 5), EOS]
    assert stream(data) == [*ids(*[3] * 5), EOS]


def test_articles_begin_at_level_one_headings():
    lines = [
        " ",
        " = First = ",
        " ",
        " text ",
        " = not a heading = ",
        " ",
        " = = Part = = ",
        " ",
        " more ",
        " ",
        " = Second = ",
    ]
    first, second = articles(lines)
    assert first == "".join(f"{line}\n" for line in lines[1:10])
    assert second == " = Second = \n"


def test_lines_of_a_hub_dataset_are_joined(monkeypatch, tokenizer_dir, cache_dir):
    rows = Dataset.from_dict({"page": ["", " = w1 = \n", "", " w2 \n", "", " = w3 = \n", "", " w4 \n"]})
    asked = []

    def load_dataset(*arguments, split, cache_dir):
        asked.append((*arguments, split))
        return rows

    monkeypatch.setattr(text_module, "load_dataset", load_dataset)
    options = {"subset": "wikitext-2-raw-v1", "text_column": "page", "wikitext_lines": True}
    data = module(tokenizer_dir, cache_dir, "Salesforce/wikitext", **options)
    assert stream(data) == [2, *ids(1), 2, *ids(2), EOS, 2, *ids(3), 2, *ids(4), EOS]
    assert asked == [("Salesforce/wikitext", "wikitext-2-raw-v1", "validation")]
    with pytest.raises(ValueError, match="Salesforce/wikitext, train: no column 'text'; found page"):
        module(tokenizer_dir, cache_dir, "Salesforce/wikitext").setup("fit")


def test_batches_of_both_kinds(tmp_path, tokenizer_dir, cache_dir):
    (tmp_path / "train.txt").write_text(words(*range(30)))
    (tmp_path / "valid.txt").write_text(words(*range(9)))
    data = module(tokenizer_dir, cache_dir, tmp_path, batch_size=2)
    data.setup("fit")
    whole = data.stream("train").tolist()
    epochs = []
    loader = data.train_dataloader()
    for epoch in range(4):
        loader.sampler.set_epoch(epoch)
        batches = [batch["input_ids"].tolist() for batch in loader]
        windows = [window for batch in batches for window in batch]
        assert len(windows) == 6
        for window in windows:
            start = whole.index(window[0])
            assert window == whole[start : start + 4]
        epochs.append(windows)
    assert len({tuple(map(tuple, windows)) for windows in epochs}) == 4
    first, last = data.val_dataloader()[0]
    assert first["input_ids"].tolist() == first["labels"].tolist() == [ids(0, 1, 2, 3), ids(4, 5, 6, 7)]
    assert last["input_ids"].tolist() == [[*ids(8), EOS]]
    assert last["attention_mask"].tolist() == [[1, 1]]


def test_the_last_window_is_padded(tmp_path, tokenizer_dir, bare_tokenizer_dir, cache_dir):
    (tmp_path / "valid.txt").write_text(words(*range(5)))
    data = module(tokenizer_dir, cache_dir, tmp_path, batch_size=2)
    data.setup("validate")
    (batch,) = data.val_dataloader()[0]
    assert batch["input_ids"].tolist() == [ids(0, 1, 2, 3), [*ids(4), EOS, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    assert batch["labels"].tolist() == [ids(0, 1, 2, 3), [*ids(4), EOS, -100, -100]]
    with pytest.raises(ValueError, match="has no eos token, which separates documents"):
        module(bare_tokenizer_dir, cache_dir, tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("train.jsonl", b'{"body": "w1"}\n', r"train\.jsonl, line 1: no column 'text'; found 'body'"),
        (
            "train.jsonl",
            b'{"text": "w1"}\n{"text": null}\n',
            r"train\.jsonl, line 2: column 'text' holds None; expected",
        ),
        ("train.txt", b"", r"train\.txt: no rows"),
        ("train.txt", b"w1\nw2 \xff\n", r"train\.txt, line 2: byte 4 \(0xff\) is not UTF-8"),
        ("train.txt", b"w1", r"seq_len is 4, but the training text has only 2 tokens"),
        ("train.txt", b"w1 w2 w3 w4", r"batch_size is 2, .* only 1 rows"),
    ],
)
def test_unusable_text(tmp_path, tokenizer_dir, cache_dir, name, content, message):
    (tmp_path / name).write_bytes(content)

    def loader():
        data = module(tokenizer_dir, cache_dir, tmp_path, batch_size=2)
        data.setup("fit")
        return data.train_dataloader()

    with pytest.raises(ValueError, match=message):
        loader()


def test_bad_arguments(tmp_path, tokenizer_dir, cache_dir):
    (tmp_path / "text.rst").write_text("w1")
    for options, message in [
        ({"stride": 4}, "stride is 4; expected 1 to seq_len - 1 = 3"),
        ({"stride": 0}, "stride is 0"),
        ({"seq_len": 1}, "seq_len is 1; expected at least 2"),
        ({"source": tmp_path / "text.rst"}, r"text\.rst: expected a file that ends in \.txt, \.tokens"),
    ]:
        with pytest.raises(ValueError, match=message):
            module(tokenizer_dir, cache_dir, **{"source": "embedded", **options})
    with pytest.raises(FileNotFoundError, match=r"source 'data/train.txt': no such file"):
        module(tokenizer_dir, cache_dir, "data/train.txt")


def test_positions_of_the_families():
    check_positions(64, LlamaConfig(max_position_embeddings=64), "seq_len")
    check_positions(62, RobertaConfig(max_position_embeddings=64, pad_token_id=1), "max_length")
    check_positions(10**6, MambaConfig(), "seq_len")  # no positions, no limit
    for config, length in [
        (BertConfig(max_position_embeddings=64), 65),
        (GPT2Config(n_positions=64), 65),
        (RobertaConfig(max_position_embeddings=64, pad_token_id=1), 63),
    ]:
        with pytest.raises(ValueError, match=rf"seq_len is {length}, but the model .* has only {length - 1} positions"):
            check_positions(length, config, "seq_len")


@pytest.mark.skipif(not WIKITEXT.is_file(), reason="WikiText-2 is not in data/wikitext-2")
def test_wikitext(cache_dir):
    with WIKITEXT.open(encoding="utf-8") as lines:
        documents = list(articles(line.removesuffix("\n") for line in lines))
    assert len(documents) == 60
    assert documents[0].startswith(" = Homarus gammarus = \n")
