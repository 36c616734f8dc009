"""The data module of labelled sentences: official layouts, tables, the hub, and what it refuses."""

import gzip
import json
import logging
from pathlib import Path
from types import SimpleNamespace

import pyarrow
import pyarrow.parquet
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Value

from lightning_sea.data import TASKS, GLUEDataModule
from lightning_sea.data import glue as glue_module
from lightning_sea.data.glue_rows import glue_rows

REAL_FOLDER = Path(__file__).parents[2] / "data" / "glue"

# Header of the official training and dev files ("" for none), one of their rows, its texts and its label.
OFFICIAL = {
    "cola": ("", 'gj04\t0\t*\tHe said "w1', ('He said "w1',), 0),
    "sst2": ("sentence\tlabel", "w1 w2 \t1", ("w1 w2 ",), 1),
    "mrpc": (
        "\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String",
        '1\t70\t80\tHe , " the witness\tw1 "" w2',
        ('He , " the witness', 'w1 "" w2'),
        1,
    ),
    "qqp": ("id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate", "7\t1\t2\tw1?\tw2?\t0", ("w1?", "w2?"), 0),
    "stsb": (
        "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2\tscore",
        "0\tmain\tMSR\t2012\t1\tnone\tnone\tw1\tw2\t3.750",
        ("w1", "w2"),
        3.75,
    ),
    "mnli": (
        "index\tpromptID\tpairID\tgenre\tsentence1_binary_parse\tsentence2_binary_parse\tsentence1_parse\t"
        "sentence2_parse\tsentence1\tsentence2\tlabel1\tgold_label",
        "0\t1\t1n\tfiction\t( w )\t( w )\t( w )\t( w )\tw1\tw2\tentailment\tcontradiction",
        ("w1", "w2"),
        2,
    ),
    "qnli": ("index\tquestion\tsentence\tlabel", "0\tw1?\tw2\tnot_entailment", ("w1?", "w2"), 1),
    "rte": ("index\tsentence1\tsentence2\tlabel", "0\tw1\tw2\u2028w3\tentailment", ("w1", "w2\u2028w3"), 0),
    "wnli": ("index\tsentence1\tsentence2\tlabel", "0\tw1\tw2\t1", ("w1", "w2"), 1),
}


def write(path: Path, *lines: str, end: str = "\n") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes("".join(line + end for line in lines if line).encode())
    return path


def rte(path: Path, *labels: str) -> Path:
    return write(path, "index\tsentence1\tsentence2\tlabel", *(f"{i}\tw{i}\tw1\t{x}" for i, x in enumerate(labels)))


def module(task, tokenizer_dir, cache_dir, source, **options) -> GLUEDataModule:
    return GLUEDataModule(task, tokenizer_dir, str(source), cache_dir=cache_dir, **{"batch_size": 2} | options)


def rows_of(dataset) -> list[tuple]:
    return [(row["input_ids"], row["labels"], row["idx"]) for row in dataset]


def test_the_table_lists_the_nine_tasks():
    assert set(OFFICIAL) | {"topics", "imdb"} == set(TASKS)
    for task in TASKS.values():
        assert len(task.submission_files) == len(task.predict_splits)
        assert len(task.columns) == len(task.tsv_columns)


@pytest.mark.parametrize("task", OFFICIAL)
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_official_rows(tmp_path, task, end):
    header, row, texts, label = OFFICIAL[task]
    path = write(tmp_path / "train.tsv", header, row, row, end=end)
    rows = list(glue_rows((str(path),), task, needs_label=True))
    assert [row["idx"] for row in rows] == ([0, 1] if "index" not in header else [0, 0])
    assert rows[0]["label"] == label
    assert tuple(rows[0][column] for column in TASKS[task].columns) == texts


@pytest.mark.parametrize("task", OFFICIAL)
def test_every_task_gives_batches(tmp_path, task, tokenizer_dir, cache_dir):
    header, row, _, label = OFFICIAL[task]
    folder = tmp_path / "glue" / TASKS[task].folder
    for name in ("train", "dev", "dev_matched", "dev_mismatched"):
        write(folder / f"{name}.tsv", header, row, row, row)
    data = module(task, tokenizer_dir, cache_dir, tmp_path / "glue")  # the folder of all tasks
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    assert batch["input_ids"].shape == batch["attention_mask"].shape == batch["token_type_ids"].shape
    assert batch["labels"].tolist() == [label, label]
    assert batch["labels"].dtype == (torch.float32 if task == "stsb" else torch.int64)
    assert batch["token_type_ids"].max() == len(TASKS[task].columns) - 1
    loaders = data.val_dataloader()
    assert len(loaders) == (2 if task == "mnli" else 1)
    assert [sum(len(batch["labels"]) for batch in loader) for loader in loaders] == [3] * len(loaders)
    assert data.num_labels == {"stsb": 1, "mnli": 3}.get(task, 2)


def test_pairs_are_framed_and_cut(tmp_path, tokenizer_dir, cache_dir, caplog):
    write(tmp_path / "train.tsv", "index\tsentence1\tsentence2\tlabel", "0\tw0 w1\tw2\t1", "1\tw0 w1 w2 w3 w4\tw5\t0")
    data = module("wnli", tokenizer_dir, cache_dir, tmp_path, max_length=7)
    with caplog.at_level(logging.INFO, logger="lightning.pytorch.utilities.rank_zero"):
        data.setup("fit")
    short, long = data.splits["train"]
    assert short["input_ids"] == [3, 5, 6, 4, 7, 4]
    assert short["token_type_ids"] == [0, 0, 0, 0, 1, 1]
    assert len(long["input_ids"]) == 7
    assert "wnli train: 1 of 2 rows fill max_length = 7" in caplog.text


def test_other_tables_of_an_official_folder_are_left_alone(tmp_path, tokenizer_dir, cache_dir):
    header, row, *_ = OFFICIAL["mrpc"]
    write(tmp_path / "train.tsv", header, row, row)
    write(tmp_path / "dev.tsv", header, row)
    write(tmp_path / "dev_ids.tsv", "12\t13")
    data = module("mrpc", tokenizer_dir, cache_dir, tmp_path)
    data.setup("fit")
    assert len(data.splits["validation"]) == 1


def test_short_lines_of_qqp_are_left_out_with_a_warning(tmp_path):
    header, row, *_ = OFFICIAL["qqp"]
    path = write(tmp_path / "train.tsv", header, row, "8\t1\t2\tcut", row)
    with pytest.warns(UserWarning, match=r"train\.tsv, line 3: 4 of 6 fields; left out"):
        rows = list(glue_rows((str(path),), "qqp", needs_label=True))
    assert [row["idx"] for row in rows] == [0, 1]


def test_predict_reads_rows_without_labels(tmp_path, tokenizer_dir, cache_dir):
    write(tmp_path / "test.tsv", "index\tsentence", "4\tw1", "9\tw2", "2\tw3")  # CoLA's test file has a header
    data = module("cola", tokenizer_dir, cache_dir, tmp_path)
    data.setup("predict")
    batches = [batch for loader in data.predict_dataloader() for batch in loader]
    assert [index for batch in batches for index in batch["idx"].tolist()] == [4, 9, 2]
    assert all("labels" not in batch for batch in batches)


def table_rows() -> list[dict]:
    return [
        {"sentence1": "w1, w2", "sentence2": 'w3 "w4"', "label": "entailment", "idx": 5},
        {"sentence1": "w1\nw2", "sentence2": "", "label": "not_entailment", "idx": 6},
    ]


def test_tables_hold_the_same_rows(tmp_path, tokenizer_dir, cache_dir):
    rows = table_rows()
    quoted = ['"w1, w2","w3 ""w4""",entailment,5', '"w1\nw2",,not_entailment,6']
    write(tmp_path / "csv" / "train.csv", "sentence1,sentence2,label,idx", *quoted)
    lines = [json.dumps(row) for row in rows]
    write(tmp_path / "jsonl" / "train.jsonl", *lines)
    packed = write(tmp_path / "gz" / "train.jsonl.gz", *lines)
    packed.write_bytes(gzip.compress(packed.read_bytes()))
    (tmp_path / "parquet").mkdir()
    table = pyarrow.Table.from_pylist(rows)
    pyarrow.parquet.write_table(table, tmp_path / "parquet" / "train-00000-of-00001.parquet")
    found = []
    for folder in ("csv", "jsonl", "gz", "parquet"):
        data = module("rte", tokenizer_dir, cache_dir, tmp_path / folder)
        data.setup("fit")
        found.append(rows_of(data.splits["train"]))
    assert found[0] == found[1] == found[2] == found[3]
    assert [row[1:] for row in found[0]] == [(0, 5), (1, 6)]


def test_a_mapping_names_the_file_of_each_split(tmp_path, tokenizer_dir, cache_dir):
    lines = [json.dumps(row) for row in table_rows()]
    source = {
        "train": str(write(tmp_path / "a.jsonl", *lines)),
        "validation": str(write(tmp_path / "b.jsonl", lines[1])),
    }
    data = GLUEDataModule("rte", tokenizer_dir, source, batch_size=1, cache_dir=cache_dir)
    data.setup("fit")
    assert (len(data.splits["train"]), len(data.splits["validation"])) == (2, 1)


def test_one_file_is_only_evaluated(tmp_path, tokenizer_dir, cache_dir):
    path = rte(tmp_path / "mine.tsv", "entailment", "not_entailment", "entailment")
    data = module("rte", tokenizer_dir, cache_dir, path)
    data.setup("validate")
    assert [label for batch in data.val_dataloader()[0] for label in batch["labels"].tolist()] == [0, 1, 0]
    with pytest.raises(ValueError, match=r"fit needs the split 'train', but source .* has only validation, test"):
        data.setup("fit")


def test_processes_evaluate_every_row_once(tmp_path, tokenizer_dir, cache_dir):
    rte(tmp_path / "dev.tsv", *["entailment"] * 5)
    seen = []
    for rank in range(2):
        data = module("rte", tokenizer_dir, cache_dir, tmp_path)
        data.trainer = SimpleNamespace(world_size=2, global_rank=rank)
        data.setup("validate")
        seen += [index for batch in data.val_dataloader()[0] for index in batch["idx"].tolist()]
    assert sorted(seen) == [0, 1, 2, 3, 4]


def test_rows_are_cached_until_a_file_changes(tmp_path, tokenizer_dir, cache_dir, monkeypatch):
    path = rte(tmp_path / "train.tsv", "entailment", "entailment")
    first = module("rte", tokenizer_dir, cache_dir, tmp_path)
    first.setup("fit")
    again = module("rte", tokenizer_dir, cache_dir, tmp_path)
    monkeypatch.setattr(again, "tokenizer", None)  # tokenising again would fail
    again.setup("fit")
    assert rows_of(again.splits["train"]) == rows_of(first.splits["train"])
    rte(path, "entailment", "not_entailment", "entailment")
    changed = module("rte", tokenizer_dir, cache_dir, tmp_path)
    changed.setup("fit")
    assert changed.splits["train"]["labels"] == [0, 1, 0]
    shorter = module("rte", tokenizer_dir, cache_dir, tmp_path, max_length=4)
    shorter.setup("fit")
    assert {len(ids) for ids in shorter.splits["train"]["input_ids"]} == {4}


def hub(names: list[str], **columns):
    """A stand-in for ``load_dataset`` that keeps what it was asked for."""
    calls = []

    def load_dataset(*arguments, split, cache_dir):
        calls.append((*arguments, split))
        texts = dict.fromkeys(columns, Value("string"))
        features = Features({**texts, "label": ClassLabel(names=names), "idx": Value("int32")})
        size = len(next(iter(columns.values())))
        labels = [-1] * size if split.startswith("test") else [0] * size
        return Dataset.from_dict({**columns, "label": labels, "idx": list(range(size))}, features=features)

    return load_dataset, calls


def test_the_hub_is_asked_for_the_task_and_its_splits(monkeypatch, tokenizer_dir, cache_dir):
    names = ["entailment", "neutral", "contradiction"]
    load, calls = hub(names, premise=["w1", "w2"], hypothesis=["w3", "w4"])
    monkeypatch.setattr(glue_module, "load_dataset", load)
    data = GLUEDataModule("mnli", tokenizer_dir, cache_dir=cache_dir)
    for stage in ("fit", "test", "predict"):
        data.setup(stage)
    splits = ["train", "validation_matched", "validation_mismatched", "test_matched", "test_mismatched"]
    assert calls == [("nyu-mll/glue", "mnli", split) for split in splits]
    assert len(data.test_dataloader()) == len(data.predict_dataloader()) == 2


def test_hub_data_that_do_not_fit(monkeypatch, tokenizer_dir, cache_dir):
    for names, column, message in [
        (["entailment", "not_entailment"], "premise", "nyu-mll/glue, rte, train: no column 'sentence1'; found premise"),
        (["not_entailment", "entailment"], "sentence1", "labels not_entailment, entailment; expected entailment, not"),
    ]:
        monkeypatch.setattr(glue_module, "load_dataset", hub(names, **{column: ["w1"], "sentence2": ["w2"]})[0])
        with pytest.raises(ValueError, match=message):
            GLUEDataModule("rte", tokenizer_dir, cache_dir=cache_dir).setup("fit")


HEADER = "index\tsentence1\tsentence2\tlabel"


@pytest.mark.parametrize(
    ("task", "name", "content", "message"),
    [
        (
            "rte",
            "train.tsv",
            f"{HEADER}\n0\tw1\tw2\tmaybe\n",
            r"line 2: column 'label' holds 'maybe'; expected one of e",
        ),
        ("rte", "train.tsv", f"{HEADER}\n0\tw1\tw2\t2\n", r"line 2: column 'label' holds '2'; .* an index from 0 to 1"),
        ("rte", "train.tsv", f"{HEADER}\n0\tw1\t1\n", r"line 2: 3 fields; expected 4 \(index, sentence1, sentence2, l"),
        (
            "rte",
            "train.tsv",
            "index\tsentence1\tlabel\n0\tw1\t1\n",
            r"line 2: no column 'sentence2'; found 'index', 's",
        ),
        ("rte", "train.tsv", "index\tsentence1\tsentence2\n0\tw1\tw2\n", r"line 2: no column 'label'; found 'index'"),
        ("rte", "train.tsv", f"{HEADER}\nx\tw1\tw2\t1\n", r"line 2: column 'index' holds 'x'; expected a whole number"),
        ("rte", "train.tsv", f"{HEADER}\n", r"train\.tsv: no rows"),
        ("rte", "train.tsv", "", r"train\.tsv: no rows"),
        (
            "stsb",
            "train.csv",
            "sentence1,sentence2,label\nw1,w2,5.1\n",
            r"line 2: column 'label' holds '5.1'; .* 0.0 to",
        ),
        ("stsb", "train.csv", "sentence1,sentence2,label\nw1,w2,nan\n", r"line 2: column 'label' holds 'nan'"),
        ("rte", "train.csv", "sentence1,sentence2,label\nw1,w2\n", r"line 2: 2 fields; expected 3"),
        ("rte", "train.csv", 'sentence1,sentence2,label\n"w1,w2,1\n', r"train\.csv, line 2: not CSV"),
        ("rte", "train.jsonl", '{"sentence1": "w1"\n', r"train\.jsonl, line 1: not JSON .* one object per line"),
        ("rte", "train.jsonl", "[1]\n", r"train\.jsonl, line 1: list; expected one JSON object"),
        (
            "rte",
            "train.jsonl",
            '{"sentence1": 3, "sentence2": "w", "label": 1}\n',
            r"'sentence1' holds 3; expected text",
        ),
        ("rte", "train.jsonl.gz", "{}\n", r"train\.jsonl\.gz: expected a gzip file"),
        ("rte", "train.parquet", "no", r"train\.parquet: not Parquet"),
        ("rte", "train.txt", "w1", r"no file of a split; expected names with train, validation, test"),
    ],
)
def test_unusable_files(tmp_path, tokenizer_dir, cache_dir, task, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        module(task, tokenizer_dir, cache_dir, tmp_path).setup("fit")


def test_a_file_that_is_not_utf8(tmp_path, tokenizer_dir, cache_dir):
    (tmp_path / "train.tsv").write_bytes(f"{HEADER}\n0\tcaf".encode() + b"\xe9\tw1\t1\n")
    with pytest.raises(ValueError, match=r"train\.tsv, line 2: byte 6 \(0xe9\) is not UTF-8; save the file as UTF-8"):
        module("rte", tokenizer_dir, cache_dir, tmp_path).setup("fit")


def test_a_split_without_labels_is_not_measured(tmp_path, tokenizer_dir, cache_dir):
    path = write(tmp_path / "rows.jsonl", json.dumps({"text": "w1"}))
    data = GLUEDataModule("topics", tokenizer_dir, {"test": str(path)}, cache_dir=cache_dir)
    data.setup("predict")
    assert len(data.predict_dataloader()[0]) == 1
    with pytest.raises(ValueError, match=r"split 'test' of topics has rows without a label; only `+predict`+ can"):
        data.setup("test")


def test_two_formats_of_one_split(tmp_path, tokenizer_dir, cache_dir):
    for name in ("train.csv", "train.jsonl"):
        write(tmp_path / name, "x")
    with pytest.raises(ValueError, match=r"split 'train' in several formats: train\.csv, train\.jsonl"):
        module("rte", tokenizer_dir, cache_dir, tmp_path)


def test_bad_arguments(tmp_path, tokenizer_dir, bare_tokenizer_dir, cache_dir):
    rte(tmp_path / "train.tsv", "entailment")
    with pytest.raises(ValueError, match=r"task is 'sst'; expected one of cola, sst2"):
        module("sst", tokenizer_dir, cache_dir, tmp_path)
    with pytest.raises(
        ValueError, match=r"has no pad token, which batches of sentences need; set tokenizer\.pad_token"
    ):
        module("rte", bare_tokenizer_dir, cache_dir, tmp_path)
    with pytest.raises(FileNotFoundError, match="no such file or folder, nor a hub dataset's name"):
        module("rte", tokenizer_dir, cache_dir, tmp_path / "absent")
    with pytest.raises(ValueError, match="source names a split 'dev'; expected some of train, validation, test"):
        GLUEDataModule("rte", tokenizer_dir, {"dev": "x.csv"}, cache_dir=cache_dir)
    with pytest.raises(ValueError, match="embedded corpus has no split 'test_matched'; found train"):
        GLUEDataModule("mnli", tokenizer_dir, {"test_matched": "embedded"}, cache_dir=cache_dir)
    with pytest.raises(FileNotFoundError, match=r"source of split 'train': no such file: x\.csv"):
        GLUEDataModule("rte", tokenizer_dir, {"train": "x.csv"}, cache_dir=cache_dir)


@pytest.mark.skipif(not REAL_FOLDER.is_dir(), reason="the official GLUE files are not in data/glue")
@pytest.mark.parametrize(
    ("task", "train", "validation"),
    [("cola", 8551, 1043), ("sst2", 67349, 872), ("mrpc", 3667, 408), ("rte", 2490, 277)],
)
def test_the_official_files(task, train, validation):
    for name, size in (("train.tsv", train), ("dev.tsv", validation)):
        rows = list(glue_rows((str(REAL_FOLDER / TASKS[task].folder / name),), task, needs_label=True))
        assert len(rows) == size
        assert {row["label"] for row in rows} == {0, 1}
        assert all(row[column].strip() for row in rows for column in TASKS[task].columns)
