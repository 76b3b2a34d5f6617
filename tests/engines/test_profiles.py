"""Optimization profiles: what is derived from a graph's inputs, what given shapes make of it, what is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from calibration.errors import InputError
from engines.input_roles import fixed_dims
from engines.profiles import (
    ProfileLimits,
    check_profiles,
    derive_profiles,
    explicit_profiles,
    fits,
    tightest,
)
from engines.shape_grammar import parse_shapes
from engines.sidecar import Binding, Profile, ShapeRange

LIMITS = ProfileLimits(max_batch=4, max_prompt=1024, max_total=2048)


def decoder(
    batch: str = "batch",
    sequence: str = "sequence",
    past: str = "past",
    total: str = "total",
    width: int | str = 128,
    layers: int = 6,
) -> tuple[Binding, ...]:
    """The inputs of the pocket LALM's decoder; `{}` in the symbol of the past becomes the layer's number."""
    return (
        Binding("inputs_embeds", "float32", (batch, sequence, width)),
        Binding("attention_mask", "int64", (batch, total)),
        Binding("position_ids", "int64", (batch, sequence)),
        *(
            Binding(
                f"past_key_values.{layer}.{part}", "float32", (batch, 2, past.format(f"{layer}_{part}"), 32)
            )
            for layer in range(layers)
            for part in ("key", "value")
        ),
    )


POCKET = decoder()
OPTIMUM = decoder(
    "batch_size", "sequence_length", "past_sequence_length", "past_sequence_length + sequence_length", "128"
)
PER_LAYER = decoder("s0", "s1", "past_{}", "s1 + past", 128)
MULTI_AXIS = tuple(
    replace(entry, dims=(3, *entry.dims)) if entry.name == "position_ids" else entry for entry in POCKET
)
ENCODER = (
    Binding("input_features", "float32", ("clips", 128, 300)),
    Binding("feature_attention_mask", "int64", ("clips", 300)),
)
DECODERS = {"pocket": POCKET, "optimum": OPTIMUM, "per layer": PER_LAYER, "multi-axis rope": MULTI_AXIS}


def shapes_at(
    inputs: tuple[Binding, ...], batch: int, sequence: int, past: int
) -> dict[str, tuple[int, ...]]:
    """The shapes of one pass through a decoder."""
    by_name = {
        "inputs_embeds": (batch, sequence, 128),
        "attention_mask": (batch, past + sequence),
        "position_ids": (batch, sequence),
    }
    shapes = {entry.name: by_name.get(entry.name, (batch, 2, past, 32)) for entry in inputs}
    if inputs is MULTI_AXIS:
        shapes["position_ids"] = (3, batch, sequence)
    return shapes


def explicit(
    inputs: tuple[Binding, ...] = POCKET,
    *,
    low: tuple[str, ...] | str = (),
    opt: tuple[str, ...] | str = (),
    high: tuple[str, ...] | str = (),
    names: tuple[str, ...] = (),
    limits: ProfileLimits = LIMITS,
) -> tuple[Profile, ...]:
    low, opt, high = ((texts,) if isinstance(texts, str) else texts for texts in (low, opt, high))
    return explicit_profiles(inputs, low, opt, high, names, limits)


def refusal(*words: str) -> pytest.RaisesExc[InputError]:
    """An `InputError` whose message holds every word."""
    return pytest.RaisesExc(InputError, check=lambda error: all(word in str(error) for word in words))


# limits and dims


@pytest.mark.parametrize("name", ["max_batch", "max_prompt", "max_total"])
def test_a_limit_below_one_is_refused_by_its_option(name: str) -> None:
    with refusal(f"--{name.replace('_', '-')} is 0"):
        ProfileLimits(**{name: 0})


@pytest.mark.parametrize("name", ["max_batch", "max_prompt", "max_total"])
def test_a_limit_beyond_tensorrt_is_refused_by_its_option(name: str) -> None:
    """Its bindings cut 99999999999 down to an int32, and build for that."""
    most = 2**31 - 1
    assert ProfileLimits(**{"max_total": most, name: most}).max_total == most
    for size in (most + 1, 99999999999):
        with refusal(f"--{name.replace('_', '-')} is {size}; expected 1 to {most}"):
            ProfileLimits(**{"max_total": most, name: size})


def test_a_prompt_longer_than_the_total_is_refused() -> None:
    assert ProfileLimits(max_prompt=64, max_total=64).max_prompt == 64
    with refusal("--max-prompt 65", "--max-total 64"):
        ProfileLimits(max_prompt=65, max_total=64)


def test_numeric_strings_are_numbers_and_symbols_stay() -> None:
    binding = Binding("x", "float32", ("batch", "64", 8, "s0 + 1", "", "0"))
    assert fixed_dims(binding) == Binding("x", "float32", ("batch", 64, 8, "s0 + 1", "", 0))


# derived profiles


@pytest.mark.parametrize("inputs", DECODERS.values(), ids=DECODERS)
def test_a_decoder_has_a_prefill_and_a_decode_profile(inputs: tuple[Binding, ...]) -> None:
    prefill, decode = derive_profiles(inputs, LIMITS)
    assert (prefill.name, decode.name) == ("prefill", "decode")
    assert prefill.shapes["inputs_embeds"] == ShapeRange((1, 1, 128), (1, 256, 128), (4, 1024, 128))
    assert prefill.shapes["attention_mask"] == ShapeRange((1, 1), (1, 256), (4, 2048))
    assert decode.shapes["inputs_embeds"] == ShapeRange((1, 1, 128), (1, 1, 128), (4, 1, 128))
    assert decode.shapes["attention_mask"] == ShapeRange((1, 1), (1, 1025), (4, 2048))
    rows = (3,) if inputs is MULTI_AXIS else ()
    assert prefill.shapes["position_ids"] == ShapeRange((*rows, 1, 1), (*rows, 1, 256), (*rows, 4, 1024))
    for layer in range(6):
        for part in ("key", "value"):
            name = f"past_key_values.{layer}.{part}"
            assert prefill.shapes[name] == ShapeRange((1, 2, 0, 32), (1, 2, 0, 32), (4, 2, 2047, 32))
            assert decode.shapes[name] == ShapeRange((1, 2, 0, 32), (1, 2, 1024, 32), (4, 2, 2047, 32))


def test_the_smallest_limits_still_make_profiles() -> None:
    prefill, decode = derive_profiles(POCKET, ProfileLimits(max_batch=1, max_prompt=1, max_total=1))
    for profile in (prefill, decode):
        assert profile.shapes["past_key_values.0.key"] == ShapeRange(*[(1, 2, 0, 32)] * 3)
        assert profile.shapes["attention_mask"] == ShapeRange(*[(1, 1)] * 3)


def test_graphs_without_a_past_have_one_profile() -> None:
    (encoder,) = derive_profiles(ENCODER, LIMITS)
    assert encoder == Profile(
        "default",
        {
            "input_features": ShapeRange((1, 128, 300), (1, 128, 300), (4, 128, 300)),
            "feature_attention_mask": ShapeRange((1, 300), (1, 300), (4, 300)),
        },
    )
    (embedding,) = derive_profiles((Binding("input_ids", "int64", ("batch", "sequence")),), LIMITS)
    assert embedding.shapes["input_ids"] == ShapeRange((1, 1), (1, 256), (4, 1024))
    (uncached,) = derive_profiles(POCKET[:3], LIMITS)
    assert uncached.shapes["attention_mask"] == ShapeRange((1, 1), (1, 256), (4, 1024))


def test_a_graph_of_fixed_dims_has_no_profile() -> None:
    fixed = (Binding("inputs_embeds", "float32", (1, "16", 128)),)
    assert derive_profiles(fixed, LIMITS) == ()
    check_profiles(fixed, ())


def test_fixed_inputs_are_not_part_of_a_profile() -> None:
    inputs = (*POCKET, Binding("scale", "float32", (1, "4")))
    assert all("scale" not in profile.shapes for profile in derive_profiles(inputs, LIMITS))


@pytest.mark.parametrize(("length", "name"), [(1, "decode"), (16, "prefill")])
def test_a_decoder_of_fixed_sequence_has_the_one_profile_that_it_serves(length: int, name: str) -> None:
    inputs = decoder(sequence=str(length))
    (profile,) = derive_profiles(inputs, LIMITS)
    assert profile.name == name
    assert profile.shapes["past_key_values.0.key"].max == (4, 2, 2048 - length, 32)
    assert profile.shapes["attention_mask"].min == (1, length)
    assert profile.shapes["attention_mask"].max == (4, 2048)


def test_another_input_has_the_role_of_its_symbol() -> None:
    inputs = (*OPTIMUM, Binding("token_types", "int64", ("sequence_length", "batch_size")))
    prefill, decode = derive_profiles(inputs, LIMITS)
    assert prefill.shapes["token_types"] == ShapeRange((1, 1), (256, 1), (1024, 4))
    assert decode.shapes["token_types"].max == (1, 4)


@pytest.mark.parametrize("symbol", ["frames", "", -1])
def test_a_dimension_without_a_default_is_refused_by_name(symbol: str | int) -> None:
    inputs = (*POCKET, Binding("mel", "float32", ("batch", symbol, 80)))
    with refusal("axis 1", "'mel'", repr(symbol), "--min-shapes", "--opt-shapes", "--max-shapes"):
        derive_profiles(inputs, LIMITS)
    with refusal("axis 1", "'mel'", "min not given"):
        explicit(inputs, low="inputs_embeds:1x1x128", opt="mel:1x300x80", high="mel:4x600x80")


def test_dimensions_without_a_symbol_are_not_taken_for_one_another() -> None:
    inputs = (Binding("x", "float32", (-1, 2)), Binding("y", "float32", (-1, 2)))
    (profile,) = explicit(inputs, opt="x:3x2,y:5x2")
    assert profile.shapes == {"x": ShapeRange(*[(3, 2)] * 3), "y": ShapeRange(*[(5, 2)] * 3)}


limits_strategy = st.builds(
    lambda batch, prompt, extra: ProfileLimits(batch, prompt, prompt + extra),
    st.integers(1, 8),
    st.integers(1, 700),
    st.integers(0, 700),
)


@given(limits_strategy, st.sampled_from(list(DECODERS)), st.data())
def test_whatever_the_limits_allow_fits_a_derived_profile(
    limits: ProfileLimits, kind: str, data: st.DataObject
) -> None:
    inputs = DECODERS[kind]
    profiles = derive_profiles(inputs, limits)
    check_profiles(inputs, profiles)
    batch = data.draw(st.integers(1, limits.max_batch))
    sequence = data.draw(st.integers(1, limits.max_prompt))
    past = data.draw(st.integers(0, limits.max_total - sequence))
    chosen = tightest(profiles, shapes_at(inputs, batch, sequence, past))
    assert chosen == (1 if sequence == 1 and limits.max_prompt > 1 else 0)


@given(limits_strategy, st.data())
def test_nothing_beyond_the_limits_fits_a_derived_profile(limits: ProfileLimits, data: st.DataObject) -> None:
    batch, sequence, past = data.draw(
        st.sampled_from(
            [
                (limits.max_batch + 1, 1, 0),
                (1, limits.max_prompt + 1, 0),
                (1, 1, limits.max_total),
                (1, limits.max_prompt, limits.max_total - limits.max_prompt + 1),
                (0, 1, 0),
                (1, 0, 1),
            ]
        )
    )
    shapes = shapes_at(POCKET, batch, sequence, past)
    assert not any(fits(profile, shapes) for profile in derive_profiles(POCKET, limits))


# the grammar of shapes


def test_shapes_are_read_as_trtexec_reads_them() -> None:
    assert parse_shapes("inputs_embeds:1x1x64,past_key_values.0.key:1x2x0x32", "--min-shapes") == {
        "inputs_embeds": (1, 1, 64),
        "past_key_values.0.key": (1, 2, 0, 32),
    }
    assert parse_shapes("Input:0:1x3, 'Other:1':4", "--min-shapes") == {"Input:0": (1, 3), "Other:1": (4,)}
    assert parse_shapes("a:scalar,b:", "--min-shapes") == {"a": (), "b": ()}


@pytest.mark.parametrize(
    "piece",
    ["", "x", "x:1x", "x:x1", "x:1x-1", "x:1.5", "x:1xb", ":1x1", "x:1 x2", "'x:1", "'x'1", "x'y':1", "x:٣"],
)
def test_a_malformed_piece_is_named_with_its_option(piece: str) -> None:
    with refusal("--opt-shapes", repr(piece), "INPUT:AxBxC"):
        parse_shapes(f"good:1x1,{piece}", "--opt-shapes")


@pytest.mark.parametrize("size", ["2147483648", "9" * 5000])
def test_a_dimension_beyond_tensorrt_is_refused(size: str) -> None:
    with refusal("--opt-shapes", "from 0 to 2147483647"):
        parse_shapes(f"x:1x{size}", "--opt-shapes")


def test_an_input_named_twice_is_refused() -> None:
    with refusal("--max-shapes", "'x' is named twice"):
        parse_shapes("x:1,y:2,'x':1", "--max-shapes")


names_strategy = st.text(
    st.characters(exclude_characters="',", exclude_categories=("Z", "C")), min_size=1, max_size=12
)


@given(
    st.dictionaries(
        names_strategy, st.lists(st.integers(0, 2**31 - 1), max_size=5).map(tuple), min_size=1, max_size=5
    ),
    st.booleans(),
)
def test_written_shapes_are_read_back(shapes: dict[str, tuple[int, ...]], quoted: bool) -> None:
    quote = "'" if quoted else ""
    text = ",".join(
        f"{quote}{name}{quote}:{'x'.join(map(str, dims)) or 'scalar'}" for name, dims in shapes.items()
    )
    assert parse_shapes(text, "--min-shapes") == shapes


# profiles from given shapes


def test_one_input_binds_its_roles_and_the_others_follow() -> None:
    (profile,) = explicit(
        low="inputs_embeds:1x2x128,past_key_values.3.value:1x2x0x32",
        opt="inputs_embeds:2x64x128,past_key_values.3.value:2x2x16x32",
        high="inputs_embeds:8x512x128,past_key_values.3.value:8x2x100x32",
    )
    assert profile.name == "profile-0"
    assert list(profile.shapes) == [entry.name for entry in POCKET]
    assert profile.shapes["position_ids"] == ShapeRange((1, 2), (2, 64), (8, 512))
    assert profile.shapes["attention_mask"] == ShapeRange((1, 2), (2, 80), (8, 612))
    assert profile.shapes["past_key_values.0.key"] == ShapeRange(
        (1, 2, 0, 32), (2, 2, 16, 32), (8, 2, 100, 32)
    )


def test_open_roles_have_the_range_of_prefill_and_keep_the_total() -> None:
    (profile,) = explicit(
        low="inputs_embeds:1x8x128", opt="inputs_embeds:1x8x128", high="inputs_embeds:1x64x128"
    )
    assert profile.shapes["past_key_values.0.key"] == ShapeRange(
        (1, 2, 0, 32), (1, 2, 0, 32), (1, 2, 2040, 32)
    )
    assert profile.shapes["attention_mask"] == ShapeRange((1, 8), (1, 8), (1, 2048))
    (profile,) = explicit(opt="past_key_values.0.key:2x2x100x32")
    assert profile.shapes["inputs_embeds"] == ShapeRange((2, 1, 128), (2, 256, 128), (2, 1024, 128))
    assert profile.shapes["attention_mask"] == ShapeRange((2, 101), (2, 356), (2, 1124))


def test_a_default_yields_to_what_is_given() -> None:
    (profile,) = explicit(low="position_ids:3x300", opt="attention_mask:3x300", high="attention_mask:9x4096")
    assert profile.shapes["inputs_embeds"] == ShapeRange((3, 300, 128), (3, 300, 128), (9, 1024, 128))
    assert profile.shapes["past_key_values.0.key"].max == (9, 2, 3796, 32)
    check_profiles(POCKET, [profile])


def test_a_total_that_is_given_is_shared_out() -> None:
    (profile,) = explicit(opt="inputs_embeds:1x16x128,attention_mask:1x48")
    assert profile.shapes["past_key_values.5.key"] == ShapeRange(*[(1, 2, 32, 32)] * 3)
    (profile,) = explicit(opt="past_key_values.0.key:1x2x32x32,attention_mask:1x48")
    assert profile.shapes["inputs_embeds"] == ShapeRange(*[(1, 16, 128)] * 3)
    (profile,) = explicit(
        low="attention_mask:1x1,past_key_values.0.key:1x2x0x32",
        high="attention_mask:1x5000,past_key_values.0.key:1x2x10x32",
    )
    assert profile.shapes["inputs_embeds"].max == (1, 4990, 128)
    (profile,) = explicit(opt="attention_mask:1x48")
    assert profile.shapes["inputs_embeds"] == ShapeRange(*[(1, 48, 128)] * 3)


def test_a_derived_profile_can_be_given_in_full() -> None:
    derived = derive_profiles(POCKET, LIMITS)

    def written(kind: str) -> tuple[str, ...]:
        return tuple(
            ",".join(
                f"{name}:{'x'.join(map(str, getattr(shape, kind)))}" for name, shape in profile.shapes.items()
            )
            for profile in derived
        )

    given_back = explicit(
        low=written("min"), opt=written("opt"), high=written("max"), names=("prefill", "decode")
    )
    assert given_back == derived


@pytest.mark.parametrize(
    ("kinds", "expected"),
    [
        ("low", (2, 2, 2)),
        ("opt", (3, 3, 3)),
        ("high", (4, 4, 4)),
        ("low opt", (2, 3, 3)),
        ("low high", (2, 4, 4)),
        ("opt high", (3, 3, 4)),
        ("low opt high", (2, 3, 4)),
    ],
)
def test_a_kind_that_is_not_given_is_copied_as_trtexec_does(
    kinds: str, expected: tuple[int, int, int]
) -> None:
    texts = {"low": "input_features:2x8", "opt": "input_features:3x8", "high": "input_features:4x8"}
    inputs = (Binding("input_features", "float32", ("clips", 8)),)
    (profile,) = explicit(inputs, **{kind: texts[kind] for kind in kinds.split()})
    assert profile.shapes["input_features"] == ShapeRange(*((n, 8) for n in expected))


def test_the_nth_shapes_make_the_nth_profile() -> None:
    texts = ("inputs_embeds:1x64x128", "inputs_embeds:1x1x128")
    assert [profile.name for profile in explicit(opt=texts)] == ["profile-0", "profile-1"]
    long, short = explicit(opt=texts, names=("long", "short"))
    assert (long.name, short.name) == ("long", "short")
    assert long.shapes["position_ids"].max == (1, 64)
    assert short.shapes["position_ids"].max == (1, 1)


def test_counts_and_names_must_agree() -> None:
    one, two = ("inputs_embeds:1x1x128",), ("inputs_embeds:1x1x128", "inputs_embeds:1x2x128")
    with refusal("--min-shapes 1", "--max-shapes 2"):
        explicit(low=one, high=two)
    for names in (("a",), ("a", "b", "c")):
        with refusal(f"--profile names {len(names)}", "given for 2"):
            explicit(opt=two, names=names)
    with refusal("same name", "a, a"):
        explicit(opt=two, names=("a", "a"))
    for names in ((), ("a",)):
        with refusal("needs shapes"):
            explicit(names=names)


def test_shapes_for_a_graph_of_fixed_dims_are_refused() -> None:
    with refusal("--opt-shapes", "every dimension of the graph is fixed", "x: float32 [4]"):
        explicit((Binding("x", "float32", ("4",)),), opt="x:4")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("mask:1x1", ("'mask'", "inputs_embeds, attention_mask")),
        ("inputs_embeds:1x1", ("'inputs_embeds'", "2 dimensions", "expected 3")),
        ("inputs_embeds:1x1x64", ("axis 2 of 'inputs_embeds' is 64", "fixes it at 128")),
        (
            "inputs_embeds:2x8x128,position_ids:2x9",
            ("sequence", "8 in 'inputs_embeds'", "9 in 'position_ids'"),
        ),
        ("inputs_embeds:2x8x128,attention_mask:3x8", ("batch", "2 in", "3 in 'attention_mask'")),
        (
            "past_key_values.0.key:1x2x4x32,past_key_values.5.value:1x2x5x32",
            ("past", "4 in 'past_key_values.0.key'", "5 in 'past_key_values.5.value'"),
        ),
        (
            "inputs_embeds:1x8x128,past_key_values.0.key:1x2x4x32,attention_mask:1x13",
            ("'attention_mask' is 13", "past 4", "sequence 8", "expected 12"),
        ),
        (
            "past_key_values.0.key:1x2x9x32,attention_mask:1x5",
            ("'attention_mask' is 5", "past 9", "sequence 0", "expected 9"),
        ),
        ("inputs_embeds:1x8x128,attention_mask:1x7", ("'attention_mask' is 7", "past 0", "expected 8")),
    ],
)
@pytest.mark.parametrize("inputs", [POCKET, OPTIMUM], ids=["pocket", "optimum"])
def test_shapes_that_contradict_are_refused(
    inputs: tuple[Binding, ...], text: str, words: tuple[str, ...]
) -> None:
    with refusal("profile 'profile-0'", *words):
        explicit(inputs, opt=text)


def test_a_largest_total_must_be_reachable_and_enough() -> None:
    ends = {"low": "inputs_embeds:1x1x128,past_key_values.0.key:1x2x0x32"}
    largest = "inputs_embeds:1x8x128,past_key_values.0.key:1x2x20x32,attention_mask:1x"
    for total in (21, 28):
        (profile,) = explicit(**ends, opt=ends["low"], high=f"{largest}{total}")
        assert profile.shapes["attention_mask"].max == (1, total)
    for total in (20, 29):
        with refusal("max shapes", f"is {total}", "past 20", "sequence 8", "21 to 28"):
            explicit(**ends, opt=ends["low"], high=f"{largest}{total}")


def test_min_opt_and_max_must_be_in_order() -> None:
    with refusal("axis 1 of 'inputs_embeds'", "min 8, opt 4, max 16"):
        explicit(low="inputs_embeds:1x8x128", opt="inputs_embeds:1x4x128", high="inputs_embeds:1x16x128")


@pytest.mark.parametrize("past", [2**31 - 8, 2**31 - 1])
def test_past_and_sequence_together_stay_within_what_tensorrt_takes(past: int) -> None:
    low = "inputs_embeds:1x1x128,past_key_values.0.key:1x2x0x32"
    with refusal("axis 1 of 'attention_mask' is up to", f"{past + 8}", f"at most {2**31 - 1}"):
        explicit(low=low, opt=low, high=f"inputs_embeds:1x8x128,past_key_values.0.key:1x2x{past}x32")
    largest = f"inputs_embeds:1x7x128,past_key_values.0.key:1x2x{2**31 - 8}x32"
    (profile,) = explicit(low=low, opt=low, high=largest)
    assert profile.shapes["attention_mask"].max == (1, 2**31 - 1)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("inputs_embeds:0x8x128", "batch is 0 in 'inputs_embeds'; expected 1 or more"),
        ("inputs_embeds:1x0x128", "sequence is 0 in 'inputs_embeds'; expected 1 or more"),
        ("past_key_values.0.key:0x2x4x32", "batch is 0 in 'past_key_values.0.key'"),
    ],
)
@pytest.mark.parametrize("kind", ["low", "opt", "high"])
def test_a_pass_without_rows_or_tokens_is_refused(text: str, words: str, kind: str) -> None:
    with refusal({"low": "min", "opt": "opt", "high": "max"}[kind] + " shapes: " + words):
        explicit(**{kind: text})  # type: ignore[arg-type]


@pytest.mark.parametrize(("kind", "told"), [("low", "min"), ("opt", "opt"), ("high", "max")])
def test_a_refusal_names_the_shapes_that_were_given(kind: str, told: str) -> None:
    """Also where other kinds were copied from them."""
    with refusal(f"profile 'profile-0', {told} shapes: axis 2 of 'inputs_embeds' is 64"):
        explicit(**{kind: "inputs_embeds:1x8x64"})  # type: ignore[arg-type]


sizes_strategy = st.lists(st.integers(0, 5000), min_size=3, max_size=3).map(sorted)
counts_strategy = st.lists(st.integers(1, 5000), min_size=3, max_size=3).map(sorted)


@given(counts_strategy, counts_strategy, sizes_strategy, limits_strategy)
def test_any_ordered_sizes_of_some_roles_make_a_profile(
    batch: list[int], sequence: list[int], past: list[int], limits: ProfileLimits
) -> None:
    texts = [
        f"position_ids:{b}x{s},past_key_values.1.key:{b}x2x{p}x32"
        for b, s, p in zip(batch, sequence, past, strict=True)
    ]
    for kept in (slice(0, 2), slice(0, 1), slice(1, 2)):
        low, opt, high = (",".join(text.split(",")[kept]) for text in texts)
        (profile,) = explicit(low=low, opt=opt, high=high, limits=limits)
        check_profiles(POCKET, [profile])
        assert profile.shapes["past_key_values.0.key"].opt[0] == batch[1]
        if kept == slice(0, 2):
            sums = [(b, p + s) for b, p, s in zip(batch, past, sequence, strict=True)]
            assert profile.shapes["attention_mask"] == ShapeRange(*sums)


@given(sizes_strategy, st.sampled_from(["", ",position_ids", ",past_key_values.0.key"]), st.data())
def test_any_ordered_totals_are_shared_out(totals: list[int], with_role: str, data: st.DataObject) -> None:
    least = 1 if with_role == ",position_ids" else 0  # a pass has a token, and its total holds it
    totals = [max(total, least) for total in totals]
    part = data.draw(st.integers(least, totals[0]))
    suffix = {"": "", ",position_ids": f":1x{part}", ",past_key_values.0.key": f":1x2x{part}x32"}[with_role]
    low, opt, high = (f"attention_mask:1x{total}{with_role}{suffix}" for total in totals)
    (profile,) = explicit(low=low, opt=opt, high=high)
    assert profile.shapes["attention_mask"] == ShapeRange(*((1, total) for total in totals))


# checks of finished profiles


def broken(name: str, **kinds: tuple[int, ...]) -> Profile:
    """The derived prefill profile with shapes of one input replaced."""
    prefill, _ = derive_profiles(POCKET, LIMITS)
    return Profile("prefill", {**prefill.shapes, name: replace(prefill.shapes[name], **kinds)})


@pytest.mark.parametrize(
    ("profile", "words"),
    [
        (broken("inputs_embeds", opt=(1, 256, 64)), ("opt", "axis 2 of 'inputs_embeds' is 64", "128")),
        (broken("inputs_embeds", min=(1, 1)), ("min", "'inputs_embeds'", "2 dimensions")),
        (broken("attention_mask", min=(1, -1)), ("min", "axis 1 of 'attention_mask' is -1")),
        (broken("attention_mask", max=(5, 2048)), ("max", "batch", "4 in 'inputs_embeds'", "5 in")),
        (broken("attention_mask", opt=(1, 255)), ("opt", "'attention_mask' is 255", "expected 256")),
        (broken("attention_mask", max=(4, 2047)), ("max", "'attention_mask' is 2047", "2048 to 3071")),
        (broken("past_key_values.2.key", max=(4, 2, 9, 32)), ("max", "past", "2047", "9 in")),
    ],
)
def test_a_profile_that_does_not_suit_the_graph_is_refused(profile: Profile, words: tuple[str, ...]) -> None:
    with refusal("'prefill'", *words):
        check_profiles(POCKET, [profile])


def test_every_dynamic_input_must_be_covered_and_no_other() -> None:
    prefill, _ = derive_profiles(POCKET, LIMITS)
    for name in prefill.shapes:
        rest = {other: shape for other, shape in prefill.shapes.items() if other != name}
        with refusal("'prefill'", f"no shapes for the dynamic input {name}: "):
            check_profiles(POCKET, [Profile("prefill", rest)])
    with refusal("no input 'past_key_values.5.value'"):
        check_profiles(POCKET[:-1], [prefill])
    with refusal("no profile"):
        check_profiles(POCKET, [])


# choosing a profile at run time


def test_the_tightest_profile_is_chosen_and_the_first_on_a_tie() -> None:
    profiles = derive_profiles(POCKET, LIMITS)
    decode_step, prompt = shapes_at(POCKET, 2, 1, 7), shapes_at(POCKET, 2, 16, 0)
    assert tightest(profiles, decode_step) == 1
    assert tightest(profiles[::-1], decode_step) == 0
    assert tightest(profiles, prompt) == 0
    assert tightest(profiles[::-1], prompt) == 1
    assert tightest([profiles[0], profiles[0]], prompt) == 0
    assert tightest((), {"x": (4,)}) == 0


def test_every_bound_of_a_range_is_within_it() -> None:
    profile = Profile("p", {"x": ShapeRange((1, 2), (2, 3), (4, 5))})
    assert fits(profile, {"x": (1, 5), "fixed": (9,)})
    for shape in ((0, 2), (5, 2), (1, 1), (1, 6), (1,), (1, 2, 1)):
        assert not fits(profile, {"x": shape})
    assert not fits(profile, {"y": (1, 2)})


def test_shapes_beyond_every_profile_are_refused_with_the_ranges() -> None:
    profiles = derive_profiles(POCKET, LIMITS)
    with refusal("axis 0 of 'inputs_embeds' is 5", "'prefill' admits 1..4", "'decode' admits 1..4"):
        tightest(profiles, shapes_at(POCKET, 5, 1, 0))
    with refusal("axis 1 of 'attention_mask' is 2049", "'decode' admits 1..2048", "--max-total"):
        tightest(profiles, shapes_at(POCKET, 1, 16, 2033))
    with refusal("'inputs_embeds' is 1x1", "4x1024x128"):
        tightest(profiles, {**shapes_at(POCKET, 1, 1, 0), "inputs_embeds": (1, 1)})
    shapes = shapes_at(POCKET, 1, 1, 0)
    del shapes["position_ids"]
    with refusal("'position_ids' is missing"):
        tightest(profiles, shapes)


def test_shapes_that_leave_each_profile_elsewhere_are_told_per_profile() -> None:
    wide = Profile("wide", {"x": ShapeRange((1, 1), (1, 1), (9, 1))})
    tall = Profile("tall", {"x": ShapeRange((1, 1), (1, 1), (1, 9))})
    with refusal("axis 1 of 'x' is 3, 'wide' admits 1..1", "axis 0 of 'x' is 2, 'tall' admits 1..1"):
        tightest([wide, tall], {"x": (2, 3)})
