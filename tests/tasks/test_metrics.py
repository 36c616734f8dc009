"""Metrics of the tasks against hand-computed values and scikit-learn, and the submission files."""

import math

import pytest
import torch
from lightning.pytorch import Trainer
from scipy import stats
from sklearn import metrics as sklearn
from tiny import RandomData

from lightning_sea.data import get_task
from lightning_sea.tasks import GLUEModule, Perplexity
from lightning_sea.tasks.causal_lm import token_losses
from lightning_sea.tasks.glue import build_metric, submission


def test_perplexity_weighs_tokens_not_batches():
    probabilities = [[0.5, 0.25], [0.1, 0.8, 0.2]]
    metric = Perplexity()
    for batch in probabilities:
        losses = -torch.tensor([[*batch, 0.7]]).log()
        metric.update(losses, torch.tensor([[True] * len(batch) + [False]]))
    product = math.prod(p for batch in probabilities for p in batch)
    assert metric.compute() == pytest.approx(product ** (-1 / 5), rel=1e-6)


def test_token_losses_shift_labels_and_skip_what_is_only_context():
    logits = torch.randn(1, 4, 3, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([[2, -100, 1, 0]])
    losses, counted = token_losses(logits, labels)
    assert counted.tolist() == [[False, True, True]]
    log_probabilities = logits.log_softmax(-1)[0]
    torch.testing.assert_close(
        losses[0], -torch.stack([torch.zeros(()), log_probabilities[1, 1], log_probabilities[2, 0]])
    )


def test_glue_metrics_equal_scikit_learn():
    generator = torch.Generator().manual_seed(0)
    predicted, target = torch.randint(0, 2, (2, 101), generator=generator)
    peers = {
        "accuracy": sklearn.accuracy_score,
        "f1": sklearn.f1_score,
        "matthews": sklearn.matthews_corrcoef,
        "pearson": lambda t, p: stats.pearsonr(t, p).statistic,
        "spearman": lambda t, p: stats.spearmanr(t, p).statistic,
    }
    numbers = torch.randn(2, 101, generator=generator)
    for name, peer in peers.items():
        p, t = numbers if name in ("pearson", "spearman") else (predicted, target)
        metric = build_metric(name, get_task("mrpc"))
        for part in range(0, 101, 40):  # batches of unequal size
            metric.update(p[part : part + 40], t[part : part + 40])
        assert float(metric.compute()) == pytest.approx(peer(t.numpy(), p.numpy()), abs=1e-5), name
    with pytest.raises(ValueError, match="metric is 'bleu'"):
        build_metric("bleu", get_task("mrpc"))


def test_submissions_use_names_indices_or_numbers_as_the_server_wants():
    assert submission({1: 0, 0: 1}, get_task("rte")) == "index\tprediction\n0\tnot_entailment\n1\tentailment\n"
    assert submission({0: 1}, get_task("cola")) == "index\tprediction\n0\t1\n"
    assert submission({0: 5.2, 1: -0.1, 2: 3.14159}, get_task("stsb")) == (
        "index\tprediction\n0\t5.000\n1\t0.000\n2\t3.142\n"
    )


@pytest.fixture
def trainer(tmp_path):
    return Trainer(
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )


def test_predict_writes_every_row_once_in_order(bert_dir, tmp_path, trainer):
    module, data = GLUEModule(model=bert_dir, task="qnli", attention="dense"), RandomData(causal=False, size=9)
    returned = trainer.predict(module, data)
    lines = (tmp_path / "predictions" / "QNLI.tsv").read_text().splitlines()
    assert lines[0] == "index\tprediction"
    assert [line.split("\t")[0] for line in lines[1:]] == [str(index) for index in range(9)]
    predicted = torch.cat([part["prediction"] for part in returned])
    assert [line.split("\t")[1] for line in lines[1:]] == [module.task.labels[index] for index in predicted]


def test_two_sets_of_mnli_are_measured_and_predicted_apart(bert_dir, tmp_path, trainer):
    class TwoSets(RandomData):
        def val_dataloader(self):
            one = super().val_dataloader()
            for item in self.items:
                item["labels"] = torch.tensor(0)
            other = RandomData(causal=False, size=7)
            other.trainer = self.trainer
            for item in other.items:
                item["labels"] = torch.tensor(1)
            return [one, other.val_dataloader()]

        test_dataloader = predict_dataloader = val_dataloader

    module = GLUEModule(model=bert_dir, task="mnli", attention="dense", prediction_dir=str(tmp_path))
    module.student.classifier.weight.data.zero_()
    module.student.classifier.bias.data = torch.tensor([1.0, 0.0, 0.0])  # always the first class
    (_, _) = measured = trainer.validate(module, TwoSets(causal=False, size=5), verbose=False)
    assert {name: value for part in measured for name, value in part.items()} == {
        "val/accuracy": 1.0,
        "val/accuracy_mismatched": 0.0,
    }
    trainer.predict(module, TwoSets(causal=False, size=5))
    assert len((tmp_path / "MNLI-m.tsv").read_text().splitlines()) == 6
    assert len((tmp_path / "MNLI-mm.tsv").read_text().splitlines()) == 8


def test_a_regression_has_one_output_a_squared_error_and_numbers_to_submit(bert_dir, tmp_path, trainer):
    module = GLUEModule(model=bert_dir, task="stsb", attention="dense", prediction_dir=str(tmp_path))
    batch = {"labels": torch.tensor([1.0, 4.0])}
    assert module.task_loss(torch.tensor([[2.0], [2.0]]), batch) == pytest.approx((1 + 4) / 2)
    module.student.classifier.weight.data.zero_()
    module.student.classifier.bias.data = torch.tensor([2.5])
    trainer.predict(module, RandomData(causal=False, size=3))
    assert (tmp_path / "STS-B.tsv").read_text() == "index\tprediction\n0\t2.500\n1\t2.500\n2\t2.500\n"
