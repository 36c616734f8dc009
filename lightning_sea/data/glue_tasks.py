"""The table of the classification tasks: the nine of GLUE, reviews in IMDb's form, and the embedded topics.

Everything that differs between the tasks stands here once. The data module reads the columns, the labels and the file
names; the training module reads ``num_labels`` and ``metrics``; writing a submission reads ``submission_files``.
"""

from dataclasses import dataclass

TOPICS = (
    "Arts",
    "Biology and health sciences",
    "Everyday life",
    "Geography",
    "History",
    "Mathematics",
    "People",
    "Philosophy and religion",
    "Physical sciences",
    "Society and social sciences",
    "Technology",
)


@dataclass(frozen=True)
class GLUETask:
    """What one task consists of.

    name: key in ``TASKS``, and the name of its configuration on the hub.
    columns: one or two text columns, as named on the hub and in CSV, JSONL and Parquet files.
    labels: names in the order of their index; empty for regression (STS-B), whose label is a number of ``label_range``.
    metrics: names of its official metrics: "accuracy", "f1" (of class 1), "matthews", "pearson", "spearman".
    folder: its folder in the official download.
    tsv_columns, tsv_label: the text columns and the label column of the official files.
    tsv_header: column names of official train and dev files that have no header line (CoLA).
    skip_short_rows: the official files have lines cut in the middle, which every user of them leaves out (QQP).
    label_column: the label column of CSV, JSONL and Parquet files; on the hub it is always "label".
    ignored_labels: rows with such a label are left out.
    validation_splits, test_splits, predict_splits: what ``validate``, ``test`` and ``predict`` go through. GLUE's own
        test labels are not public, so ``test`` uses its validation splits.
    submission_files: one official file name per predict split.
    submission_names: whether a submission holds label names (else indices).
    """

    name: str
    columns: tuple[str, ...]
    labels: tuple[str, ...]
    metrics: tuple[str, ...]
    folder: str
    tsv_columns: tuple[str, ...] = ()
    tsv_label: str = "label"
    tsv_header: tuple[str, ...] = ()
    skip_short_rows: bool = False
    label_column: str = "label"
    label_range: tuple[float, float] | None = None
    ignored_labels: tuple[str, ...] = ()
    validation_splits: tuple[str, ...] = ("validation",)
    test_splits: tuple[str, ...] = ("validation",)
    predict_splits: tuple[str, ...] = ("test",)
    submission_files: tuple[str, ...] = ()
    submission_names: bool = False

    @property
    def splits(self) -> tuple[str, ...]:
        """All splits that a source of this task may have."""
        return ("train", *self.validation_splits, *self.predict_splits)

    @property
    def num_labels(self) -> int:
        """Outputs of the classifier: the number of classes, or 1 for regression."""
        return len(self.labels) or 1

    @property
    def is_regression(self) -> bool:
        """Whether the label is a number instead of a class."""
        return not self.labels

    def __post_init__(self) -> None:
        if not self.tsv_columns:
            object.__setattr__(self, "tsv_columns", self.columns)


_MATCHED_AND_MISMATCHED = ("validation_matched", "validation_mismatched")

TASKS = {
    task.name: task
    for task in (
        GLUETask(
            name="cola",
            columns=("sentence",),
            labels=("unacceptable", "acceptable"),
            metrics=("matthews",),
            folder="CoLA",
            tsv_header=("source", "label", "star", "sentence"),
            submission_files=("CoLA.tsv",),
        ),
        GLUETask(
            name="sst2",
            columns=("sentence",),
            labels=("negative", "positive"),
            metrics=("accuracy",),
            folder="SST-2",
            submission_files=("SST-2.tsv",),
        ),
        GLUETask(
            name="mrpc",
            columns=("sentence1", "sentence2"),
            labels=("not_equivalent", "equivalent"),
            metrics=("accuracy", "f1"),
            folder="MRPC",
            tsv_columns=("#1 String", "#2 String"),
            tsv_label="Quality",
            submission_files=("MRPC.tsv",),
        ),
        GLUETask(
            name="qqp",
            columns=("question1", "question2"),
            labels=("not_duplicate", "duplicate"),
            metrics=("accuracy", "f1"),
            folder="QQP",
            tsv_label="is_duplicate",
            skip_short_rows=True,
            submission_files=("QQP.tsv",),
        ),
        GLUETask(
            name="stsb",
            columns=("sentence1", "sentence2"),
            labels=(),
            label_range=(0.0, 5.0),
            metrics=("pearson", "spearman"),
            folder="STS-B",
            tsv_label="score",
            submission_files=("STS-B.tsv",),
        ),
        GLUETask(
            name="mnli",
            columns=("premise", "hypothesis"),
            labels=("entailment", "neutral", "contradiction"),
            metrics=("accuracy",),
            folder="MNLI",
            tsv_columns=("sentence1", "sentence2"),
            tsv_label="gold_label",
            validation_splits=_MATCHED_AND_MISMATCHED,
            test_splits=_MATCHED_AND_MISMATCHED,
            predict_splits=("test_matched", "test_mismatched"),
            submission_files=("MNLI-m.tsv", "MNLI-mm.tsv"),
            submission_names=True,
        ),
        GLUETask(
            name="qnli",
            columns=("question", "sentence"),
            labels=("entailment", "not_entailment"),
            metrics=("accuracy",),
            folder="QNLI",
            submission_files=("QNLI.tsv",),
            submission_names=True,
        ),
        GLUETask(
            name="rte",
            columns=("sentence1", "sentence2"),
            labels=("entailment", "not_entailment"),
            metrics=("accuracy",),
            folder="RTE",
            submission_files=("RTE.tsv",),
            submission_names=True,
        ),
        GLUETask(
            name="wnli",
            columns=("sentence1", "sentence2"),
            labels=("not_entailment", "entailment"),
            metrics=("accuracy",),
            folder="WNLI",
            submission_files=("WNLI.tsv",),
        ),
        GLUETask(
            name="imdb",
            columns=("text",),
            labels=("negative", "positive"),
            metrics=("accuracy",),
            folder="imdb",
            test_splits=("test",),
            submission_files=("imdb.tsv",),
        ),
        GLUETask(
            name="topics",
            columns=("text",),
            labels=TOPICS,
            metrics=("accuracy",),
            folder="topics",
            label_column="topic",
            ignored_labels=("Uncategorized",),
            test_splits=("test",),
            submission_files=("topics.tsv",),
            submission_names=True,
        ),
    )
}


def get_task(name: str) -> GLUETask:
    """The task of that name.

    Raises ValueError if there is none.
    """
    if name not in TASKS:
        raise ValueError(f"task is {name!r}; expected one of {', '.join(TASKS)}")
    return TASKS[name]
