"""SEAConfig: plain types, validation that names the value, presets."""

import dataclasses
import json

import pytest

from lightning_sea.config import SEAConfig


def test_round_trip_through_json():
    config = SEAConfig.paper_bert(k=7)
    assert SEAConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert all(type(value) in (int, float, str, bool) for value in config.to_dict().values())


def test_unknown_keys_are_ignored_with_a_warning():
    with pytest.warns(UserWarning, match="knob_of_tomorrow"):
        assert SEAConfig.from_dict({"k": 5, "knob_of_tomorrow": 1}) == SEAConfig(k=5)


def test_every_field_is_documented():
    for field in dataclasses.fields(SEAConfig):
        assert f"        {field.name}: " in SEAConfig.__doc__


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"k": 0}, "k is 0, expected at least 1"),
        ({"predictor_length": 100}, "predictor_length is 100, expected a positive multiple of 32"),
        ({"bins": "round"}, "bins is 'round', expected one of"),
        ({"query_stride": 3}, "query_stride is 3"),
        ({"pooling": "none", "first_look_ratio": 1}, "nothing would score the bins"),
        ({"window": 8, "first_look_ratio": 1}, "window is 8 without a second look"),
        ({"first_look_ratio": 0}, "first_look_ratio is 0, expected at least 1"),
        ({"second_look_width": 3, "first_look_ratio": 2}, "second_look_width is 3, expected a power of two"),
        ({"bins": "relative"}, "needs bins='aligned'"),
        ({"average_context": "far", "keep_own": False}, "keep_own=False: the far field needs bins='aligned'"),
        ({"average_context": "far", "bins": "relative"}, "'far' with bins='relative'"),
        ({"window": 62}, "window is 62"),
        ({"jitter_keys": 1.0}, "jitter_keys is 1.0"),
        ({"feature_ratio": 0}, "feature_ratio is 0"),
        ({"backend": "cuda"}, "backend is 'cuda'"),
        ({"method": "reformer"}, "method is 'reformer', expected one of"),
        ({"horizon": 0}, "horizon is 0, expected at least 1"),
        ({"method": "window", "k": 5}, "k is 5, expected at least 6 with method='window'"),
        ({"method": "performer", "predictor_length": 100}, "predictor_length is 100"),
    ],
)
def test_values_that_are_not_allowed_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        SEAConfig(**changes)


@pytest.mark.parametrize("method", ["performer", "cosformer", "window"])
def test_knobs_of_the_estimator_need_not_fit_together_without_one(method):
    changes = {"bins": "relative", "pooling": "none", "average_context": "far", "window": 62}
    assert SEAConfig(method=method, **changes).replace(k=6).method == method
    with pytest.raises(ValueError, match="nothing would score the bins"):
        SEAConfig(**changes)


def test_paper_presets_have_our_additions_off():
    for config, bins in ((SEAConfig.paper_bert(), 128), (SEAConfig.paper_opt(), 256)):
        assert (config.pooling, config.bins, config.keep_first, config.keep_own) == ("none", "relative", False, False)
        assert config.predictor_length == bins
        assert config.first_look_ratio == 1
