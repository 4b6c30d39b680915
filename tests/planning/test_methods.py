import pytest

from sliderquant.errors import InputError
from sliderquant.planning.methods import (
    DEFAULT_EFFORT,
    METHODS,
    check_scheme,
    method_named,
    parse_overrides,
    setting_names,
    with_overrides,
)
from sliderquant.planning.settings import Settings
from sliderquant.planning.windows import schedule
from sliderquant.schemes import ModelScheme, Scheme

SCHEME = ModelScheme(Scheme(4))


def test_defaults_are_the_published_ones():
    settings = Settings()
    assert (settings.epochs, settings.batch_size, settings.gamma, settings.rank) == (60, 3, 0.5, 4)
    assert settings.clipping_start == 4.0
    assert settings.windows.model_dump() == {"shallow": 4, "deep": 4, "size": 2, "stride": 1}
    assert (settings.weights, settings.grid) == (False, "range")
    rates = settings.learning_rates
    assert (rates.low_rank, rates.clipping, rates.scales) == (5e-4, 1e-2, 1e-3)


@pytest.mark.parametrize(
    ("gamma", "stages"), [(1, (1.0,)), (0.5, (0.5, 1.0)), (0.25, (0.25, 0.5, 0.75, 1.0)), (1 / 3, (1 / 3, 2 / 3, 1.0))]
)
def test_gamma_gives_the_stages(gamma, stages):
    assert Settings(gamma=gamma).stages == stages


@pytest.mark.parametrize(("epochs", "gamma"), [(10, 0.5), (7, 0.25), (1, 0.5), (60, 1)])
def test_epochs_are_split_over_the_stages(epochs, gamma):
    settings = Settings(epochs=epochs, gamma=gamma)
    split = [settings.epochs_of_stage(stage) for stage in range(len(settings.stages))]
    assert sum(split) == epochs
    assert max(split) - min(split) <= 1


def test_every_setting_is_reachable_by_name():
    values = {
        "epochs": 7,
        "batch_size": 5,
        "gamma": 0.25,
        "stage_order": "window",
        "rank": 2,
        "weights": True,
        "weights_decay": 0.25,
        "hardening": True,
        "clipping": True,
        "clipping_start": 3.5,
        "grid": "free",
        "windows.shallow": 1,
        "windows.deep": 2,
        "windows.size": 4,
        "windows.stride": 3,
        "learning_rates.weights": 1e-4,
        "learning_rates.low_rank": 1e-4,
        "learning_rates.clipping": 2e-3,
        "learning_rates.activation_clipping": 3e-3,
        "activation_clipping": "always",
        "activation_clipping_start": 3.0,
        "learning_rates.scales": 3e-3,
        "last_loss": "logits",
        "relative_loss": 0.5,
        "scales.use": "always",
        "scales.start": "statistics",
        "scales.space": "log",
        "matmul": "float32",
        "retries": 1,
        "stream_memory_gb": 0.5,
        "compile": "never",
    }
    assert set(values) == set(setting_names(Settings))
    changed = with_overrides(
        METHODS["sliderquant"], SCHEME, parse_overrides(None, [f"{k}={v}" for k, v in values.items()])
    )
    for key, value in values.items():
        found = changed
        for part in key.split("."):
            found = getattr(found, part)
        assert found == value


def test_a_file_is_read_and_assignments_win(tmp_path):
    path = tmp_path / "settings.yaml"
    path.write_text("epochs: 10\nwindows:\n  shallow: 2\n  deep: 2\n")
    settings = with_overrides(
        METHODS["sliderquant"], SCHEME, parse_overrides(path, ["windows.deep=3", "learning_rates.low_rank=1e-3"])
    )
    assert (settings.epochs, settings.windows.shallow, settings.windows.deep) == (10, 2, 3)
    assert settings.learning_rates.low_rank == 1e-3


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        (
            "epoch=3",
            r"unknown setting 'epoch': did you mean epochs \(a whole number, at least 1\)\?; .*windows.shallow",
        ),
        ("samples=3", "'samples': it is no setting, but an option of the command, --samples; sliderquant has"),
        ("shallow=3", r"did you mean windows\.shallow"),
        ("learning_rate.weights=1e-3", r"'learning_rate\.weights': did you mean learning_rates\.weights"),
        ("actorder=group", "act_order is of gptq, not of sliderquant"),
        ("epochs=true", "expected a whole number, at least 1, got true"),
        ("epochs=", "got nothing"),
        ("epochs=1:30", "got '1:30'"),
        ("clipping_start=far", "setting 'clipping_start': expected a finite number, or search, got 'far'"),
        ("compile=no", "setting 'compile': expected auto or always or never, got 'no'"),
        ("gamma=1e-9", "at least 0.001 and at most 1"),
        ("windows.width=3", "unknown setting 'windows.width'"),
        ("epochs=many", "setting 'epochs': .*got 'many'"),
        ("epochs=0", "setting 'epochs': .*expected a whole number, at least 1, got 0"),
        ("gamma=0", "setting 'gamma'"),
        ("gamma=.nan", "setting 'gamma'"),
        ("windows.stride=3", "must not exceed windows.size"),
        ("windows=3", "setting 'windows'"),
        ("grid=loose", "setting 'grid'"),
        ("epochs", "expected key=value"),
        ("=3", "expected key=value"),
        ("epochs.of=3", "unknown setting|setting 'epochs'"),
        ("stage_order=both", "setting 'stage_order'"),
    ],
)
def test_bad_settings_are_named(assignment, message):
    with pytest.raises(InputError, match=message):
        with_overrides(METHODS["sliderquant"], SCHEME, parse_overrides(None, [assignment]))


def test_free_ends_need_what_they_are_learned_by():
    with pytest.raises(InputError, match=r"grid=free .* needs clipping=true"):
        with_overrides(METHODS["sliderquant"], SCHEME, {"grid": "free", "clipping": False})


def test_bad_files_are_named(tmp_path):
    with pytest.raises(InputError, match=r"missing\.yaml: cannot be read"):
        parse_overrides(tmp_path / "missing.yaml", [])
    (tmp_path / "list.yaml").write_text("- 1\n")
    with pytest.raises(InputError, match=r"list\.yaml: expected a mapping"):
        parse_overrides(tmp_path / "list.yaml", [])
    (tmp_path / "broken.yaml").write_text("epochs: [1\n")
    with pytest.raises(InputError, match=r"broken\.yaml: not valid YAML"):
        parse_overrides(tmp_path / "broken.yaml", [])


def test_numbers_in_files_are_what_they_look_like(tmp_path):
    path = tmp_path / "settings.yaml"
    path.write_bytes("windows.size: 010\r\nlearning_rates: {low_rank: 1e-3}\r\nclipping: yes\r\n".encode("utf-16"))
    assert parse_overrides(path, ["epochs=012"]) == {
        "windows": {"size": 10}, "learning_rates": {"low_rank": 1e-3}, "clipping": "yes", "epochs": 12,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "no settings in it: expected a mapping"),
        (b"# epochs: 1\n", "no settings in it"),
        (b"epochs 3", "expected a mapping .*, not one value"),
        (b"windows:\n\tsize: 1\n", "a tab in line 2: YAML is indented by spaces"),
        (b"windows:\n  size: 1\n  size: 2\n", "line 3: 'size' stands in line 2 already"),
        (b"windows: {size: 1}\nwindows.size: 2\n", "windows.size is given twice, as 1 and as 2"),
        (b"1: 2\n", "1 is not the name of a setting"),
        (b"epochs: 1 # caf\xe9 x", r"s\.yaml: not UTF-8 text \(byte 15\)"),
        (b"a: &x {b: *x}", "without an end"),
    ],
)
def test_bad_yaml_is_explained(tmp_path, content, message):
    (tmp_path / "s.yaml").write_bytes(content)
    with pytest.raises(InputError, match=message):
        parse_overrides(tmp_path / "s.yaml", [])


def test_a_setting_has_one_value():
    assert parse_overrides(None, ["epochs=2", "epochs=2"]) == {"epochs": 2}
    for twice in (["epochs=2", "epochs=3"], ["windows.size=1", "windows={size: 2}"]):
        with pytest.raises(InputError, match="is given twice"):
            parse_overrides(None, twice)
    with pytest.raises(InputError, match="as a value, and with settings of its own"):
        parse_overrides(None, ["windows=3", "windows.size=1"])
    for settings in ([1], "epochs"):
        with pytest.raises(InputError, match="expected a mapping of settings by name"):
            with_overrides(METHODS["cbq"], SCHEME, settings)


def test_unknown_method_and_settings_for_a_method_without_any():
    with pytest.raises(InputError, match=r"unknown method 'gtpq': expected one of rtn, gptq, .*, cbq, sliderquant"):
        method_named("gtpq")
    with pytest.raises(InputError, match="method rtn has no settings, but epochs was set"):
        with_overrides(METHODS["rtn"], SCHEME, {"epochs": 3})


@pytest.mark.parametrize(
    ("method", "values"),
    [
        ("gptq", {"damping": 0.1, "act_order": True}),
        ("awq", {"ratios": 5, "clipping": False, "clip_steps": 8, "clip_at_most": 0.25}),
        ("smoothquant", {"ratio": 0.75}),
    ],
)
def test_one_shot_methods_have_settings_of_their_own(method, values):
    chosen = METHODS[method]
    values = {**values, "batch_size": 2, "stream_memory_gb": 0.5}
    assert set(values) == set(setting_names(type(chosen.settings)))
    changed = with_overrides(chosen, SCHEME, parse_overrides(None, [f"{key}={value}" for key, value in values.items()]))
    assert type(changed) is type(chosen.settings)
    assert changed.model_dump() == values
    with pytest.raises(
        InputError,
        match=f"unknown setting 'epochs': epochs is of .*, not of {method}; {method} has .*{next(iter(values))}",
    ):
        with_overrides(chosen, SCHEME, {"epochs": 3})


@pytest.mark.parametrize(
    ("method", "fits", "does_not"),
    [
        ("rtn", ["W4A16", "W4A4", "W4A4KV4"], []),
        ("gptq", ["W4A16", "W4A4", "W2A16-g64"], []),
        ("awq", ["W4A16", "W3A16-sym", "W4A16KV4"], ["W4A4", "W8A8-act-sym"]),
        ("smoothquant", ["W4A4", "W8A8", "W4A4KV4"], ["W4A16", "W4A16KV4"]),
        ("sliderquant", ["W4A16", "W4A4"], []),
    ],
)
def test_methods_and_schemes_that_go_together(method, fits, does_not):
    for scheme in fits:
        check_scheme(METHODS[method], ModelScheme.parse(scheme))
    for scheme in does_not:
        with pytest.raises(InputError, match=f"method {method} with scheme {scheme}: .* use a scheme such as"):
            check_scheme(METHODS[method], ModelScheme.parse(scheme))


def test_settings_and_rotations_depend_on_the_scheme():
    weights, activations = ModelScheme.parse("W2A16"), ModelScheme.parse("W4A4KV4")
    published = METHODS["sliderquant-published"]
    assert published.settings_for(weights).model_dump() == Settings().model_dump()
    assert (published.settings_for(activations).epochs, published.settings_for(activations).rank) == (20, 4)
    rates = published.settings_for(activations).learning_rates
    assert (rates.low_rank, rates.clipping, rates.scales) == (1e-4, 1e-2, 1e-3)
    assert published.rotations_for(activations) == ()
    ours = METHODS["sliderquant"]
    assert ours.rotations_for(activations) == ("R1", "R2", "R3", "R4")
    assert ours.rotations_for(ModelScheme.parse("W4A4")) == ("R1", "R2", "R4")
    assert all(
        ours.rotations_for(scheme) == ()
        for scheme in (weights, ModelScheme.parse("W8A8"), ModelScheme.parse("W4A16KV4"))
    )


def test_there_is_one_recipe_of_ours_and_the_published_one():
    assert [name for name in METHODS if "slider" in name] == ["sliderquant", "sliderquant-published"]
    assert [name for name, method in METHODS.items() if method.efforts] == ["sliderquant"]
    assert DEFAULT_EFFORT in METHODS["sliderquant"].efforts


@pytest.mark.parametrize(("name", "windows"), [("omniquant", "[0] [1] [2] [3]"), ("cbq", "[0..1] [1..2] [2..3]")])
def test_relatives_are_windows_without_ramps(name, windows):
    for scheme in (ModelScheme.parse("W2A16"), ModelScheme.parse("W4A4KV4")):
        settings = METHODS[name].settings_for(scheme)
        assert settings.stages == (1.0,)
        assert " ".join(map(str, schedule(4, **settings.windows.model_dump()))) == windows
    assert METHODS["omniquant"].settings_for(ModelScheme.parse("W2A16")).rank == 0


def test_efforts_trade_minutes_for_accuracy():
    method = METHODS["sliderquant"]
    steps = []
    for effort in ("light", None, "default", "best"):
        settings = with_overrides(method, SCHEME, {}, effort)
        windows = schedule(12, **settings.windows.model_dump())
        steps.append(settings.epochs * sum(map(len, windows)))
        assert (settings.weights, settings.grid, settings.rank) == (True, "free", 0)
    assert steps[0] < steps[1] == steps[2] < steps[3]
    assert with_overrides(method, SCHEME, {"windows": {"deep": 3}}, "light").windows.model_dump() == {
        "shallow": 0, "deep": 3, "size": 2, "stride": 1,
    }  # fmt: skip
    assert with_overrides(method, SCHEME, {"epochs": 7}, "best").epochs == 7
    assert with_overrides(method, SCHEME, {"weights_decay": 0.5}, "light").weights_decay == 0.5


def test_offsets_decay_with_weight_only_schemes_alone_and_less_in_fewer_steps():
    method = METHODS["sliderquant"]
    for scheme, decays in (("W2A16", [0.135, 0.333, 0.333]), ("W4A16KV4", [0.135, 0.333, 0.333]), ("W4A4KV4", [0] * 3)):
        found = [with_overrides(method, ModelScheme.parse(scheme), {}, effort) for effort in ("light", None, "best")]
        assert [settings.weights_decay for settings in found] == decays, scheme


@pytest.mark.parametrize(
    ("method", "effort", "message"),
    [
        ("sliderquant", "most", "effort 'most': method sliderquant has light, default, best"),
        ("sliderquant-published", "light", "method sliderquant-published has none: use --method sliderquant"),
        ("rtn", "light", "method rtn has none"),
    ],
)
def test_efforts_that_there_are_not(method, effort, message):
    with pytest.raises(InputError, match=message):
        with_overrides(METHODS[method], SCHEME, {}, effort)
