"""Defines `SparsityConfig`: what is sparse, how much and when. Reads it from YAML, JSON, presets and mappings."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    WrapValidator,
    field_validator,
    model_validator,
)

from sparse_unsloth.config import legacy, removed
from sparse_unsloth.config.files import SUFFIXES, TITLE, did_you_mean, failure, problem, read, write
from sparse_unsloth.config.layer_rules import LayerSparsity, absent_layers, canonical_rule, expand, share
from sparse_unsloth.config.schedule import Schedule
from sparse_unsloth.errors import ConfigError

CONFIG_NAME = "sparsity_config.yaml"
"""The file that `save_pretrained` writes beside the adapter."""
NOTHING = ("", "none", "null", "off", "no", "false", "disabled", "0")
"""Words that users write for training without sparsity; the valid ones are YAML's null and the preset "dense"."""
PUBLISHED_LAYERS = 32
# Layer rules (mlp, self_attn); o1 and o2 were published for Llama-3-8B, on CSR170K and Math10K.
PRESETS: dict[str, tuple[dict[str, float], dict[str, float]]] = {
    "auto": ({}, {}),
    "dense": ({}, {}),
    "rows": ({}, {}),
    "o1": ({"17-30": 0.97}, {"17-19": 0.2, "21-23": 0.2, "25-29": 0.2}),
    "o2": ({"3-30": 0.99}, {"14-19": 0.75, "21-23": 0.75, "25-29": 0.75}),
}
BACKWARD_ROWS = 0.25
"""The value of the preset "rows"; see benchmarks/results/quality.md."""


def _distinct(value: Any, validate) -> dict[str, float]:
    rules = validate(value)
    if len(rules) < len(value):
        names = [canonical_rule(key) for key in value]
        twice = sorted({name for name in names if names.count(name) > 1})
        raise ValueError(f"must name each rule once; twice: {', '.join(twice)}")
    return rules


def _step(value: object) -> float | int:
    if isinstance(value, float) and 0 <= value <= 1:
        return float(value)
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return value
    raise ValueError("must be a float in [0, 1] (fraction of the training) or an int from 0 up (optimiser steps)")


def _kept_share(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= 1:
        raise ValueError("must be a share in (0, 1] of the context tokens; 1.0 is every token")
    return float(value)


def _budget(value: object) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
        raise ValueError("must be a number above 0: up to 1 a share of the GPU's memory, above that GiB")
    return float(value)


def _merged(value: object) -> bool | int | None:
    if value is None or isinstance(value, bool) or (isinstance(value, int) and value >= 2):
        return value
    raise ValueError("must be true (as many as fit), false, null, or an int from 2 up (at most so many)")


def _path(value: object) -> object:
    return os.fspath(value) if isinstance(value, os.PathLike) else value


Rules = Annotated[
    dict[Annotated[str, BeforeValidator(canonical_rule)], Annotated[float, BeforeValidator(share)]],
    WrapValidator(_distinct),
]
Step = Annotated[float | int, BeforeValidator(_step)]
Positive = Annotated[int, Field(strict=True, ge=1)]
NonNegative = Annotated[int, Field(strict=True, ge=0)]
Switch = Annotated[bool, Field(strict=True)]
Precision = Literal["bf16", "fp8", "fp8-context"]


_ModelType: Any = type(BaseModel)


class _Reporting(_ModelType):
    """Makes ``Config(...)`` raise like ``Config.model_validate({...})``; nested models report to their parent."""

    def __call__(cls, /, **data):
        return cls.model_validate(data)


class _Config(BaseModel, metaclass=_Reporting):
    _place: ClassVar[str] = ""
    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)

    @classmethod
    def model_validate(cls, obj, **kwargs):
        """Overrides pydantic's, so that one `ConfigError` lists every problem of ``obj``."""
        return cls._checked(obj, TITLE, [], **kwargs)

    @classmethod
    def _checked(cls, obj, source: str, problems: list[str], **kwargs):
        if isinstance(obj, Mapping):
            obj, gone = removed.drop(obj, cls._place)
            problems = problems + gone
        try:
            config = super().model_validate(obj, **kwargs)
        except ValidationError as error:
            problems = problems + [problem(cls, detail) for detail in error.errors(include_url=False)]
        if problems:
            raise failure(source, problems)
        return config


class EstimatorConfig(_Config):  # type: ignore[metaclass]
    """How channels are ranked for a batch without computing them (docs/how-it-works.md, section 4.5)."""

    _place: ClassVar[str] = "estimator."
    kind: Literal["auto", "svd", "prior"] = "auto"
    """`svd`: low-rank factors of the weight, without data (as published); `prior`: calibrated channel energies,
    corrected by the estimate of whitened factors; `auto`: `prior` where calibration samples exist, else `svd` with a
    warning."""
    rank: Positive = 8
    """Rank of the factors; 8 as published."""
    path: Annotated[str | None, Field(strict=True), BeforeValidator(_path)] = None
    """Safetensors file: loaded if it exists, else written after building."""
    calibration_samples: NonNegative = 32
    """Training samples that calibrate a calibrated kind."""

    @field_validator("calibration_samples")
    @classmethod
    def _calibrated_kinds_need_samples(cls, samples: int, info: ValidationInfo) -> int:
        kind = info.data.get("kind")
        if samples == 0 and kind == "prior" and info.data.get("path") is None:
            raise ValueError(f"must be at least 1 for kind '{kind}', unless path names factors made before")
        return samples


class SparsityConfig(_Config):  # type: ignore[metaclass]
    """Per-layer sparsity, estimator, token roles and schedule of a sparse training run.

    ``mlp`` and ``self_attn`` map layer rules to shares in [0, 1): ``"3-30": 0.99`` (both ends included), ``"5": 0.5``,
    ``"all": 0.9``. Later rules override earlier ones, and all rules override the preset. A layer without a rule is
    dense.

    Raises:
        ConfigError: unknown keys, malformed rules, values out of range; one error lists all problems.
    """

    preset: Literal["auto", "dense", "o1", "o2", "rows"] | None = None
    """`auto` (the default of `get_peft_model`, `attach` and recipes): when training begins, a forecast of its steps
    decides every one of `cuda_graphs`, `memory_budget`, `merge_micro_batches` and `backward_rows` that is not given,
    and says why; it never leaves out channels, and never computes in FP8. `rows`: `backward_rows: 0.25`. `o1`
    (conservative) and `o2` (aggressive): the layer rules of a published recipe, scaled to the model's depth. `dense`:
    no sparsity."""
    mlp: Rules = {}
    """Layer rules: the share of MLP channels that context tokens leave out."""
    self_attn: Rules = {}
    """Layer rules: the share of attention channels that context tokens leave out."""
    estimator: EstimatorConfig = EstimatorConfig()
    criterion: Literal["estimator", "oracle", "wanda", "magnitude", "random"] = "estimator"
    """What ranks the channels; all but `estimator` are baselines for studies."""
    dense_tokens: Literal["output", "none"] = "output"
    """`output`: loss tokens stay dense; `none`: every token is a context token (published for GLUE); not with
    `backward_rows`."""
    backward_rows: Annotated[float, BeforeValidator(_kept_share)] = 1.0
    """Row sparsity: the share of context tokens that each layer's backward pass goes through, those with the largest
    gradients in the batch; 1.0 is all. The forward pass is exact and nothing is calibrated. It cannot be combined with
    `mlp` and `self_attn`. The default schedule is then the whole training."""
    exact_removal: Switch = True
    """Whether unused rows and outputs are skipped: under Unsloth rows outside the loss in logits, loss and the last
    layer after its keys and values, in dense training too; and the output of an MLP that is sparse or in a whole
    layer, when gradient checkpointing recomputes it. Same loss, same gradients."""
    memory_budget: Annotated[float | None, BeforeValidator(_budget)] = None
    """Peak memory of training on a GPU: up to 1 a share of the GPU's memory, above that GiB. Gradient checkpointing is
    turned off for as many layers as fit, those that need least memory first; with `backward_rows` layers store the
    activations of loss tokens alone until all fit. It must be on; None leaves it unchanged."""
    merge_micro_batches: Annotated[bool | int | None, BeforeValidator(_merged)] = None
    """Whether micro-batches of an optimiser step run as one: the same samples, steps, loss and logs, and the same
    gradients to rounding, with fewer forwards. True: as many as fit into the memory of the GPU (`memory_budget`, where
    it is given); an int: at most so many, also where no limit is known; None is False, but under `auto` the forecast
    decides. It needs `gradient_accumulation_steps` and a supervised training of transformers', TRL's or Unsloth's
    trainer, padding-free or packed, or padded to nearly equal lengths. Where it cannot be exact, one line says why, and
    micro-batches run one by one (docs/how-it-works.md, section 5.4)."""
    cuda_graphs: Switch = False
    """Whether layers are captured in CUDA graphs and replayed, which speeds up launch-bound steps: small models, small
    micro-batches, few loss tokens. It needs layers that run as a whole (docs/how-it-works.md, section 7), an NVIDIA
    GPU and `exact_removal`; any gradient checkpointing or none. Sequences are right-padded to length buckets, by an
    eighth at most from 128 tokens on, and some context tokens stay dense. Dense training is captured too, also without
    prompts; forwards without labels run without graphs, but for those of GRPO and RLOO with `backward_rows`."""
    precision: Precision = "bf16"
    """Of products with frozen weights, in layers that run as a whole (docs/how-it-works.md, section 7): `fp8` in e4m3
    with one fp32 scale a row of activations and gradients and one a row of weights, forward and input gradients;
    `fp8-context` for context tokens alone, in dense training. Approximate: a product is off by 4 % of its norm or so,
    at random. LoRA's products, attention and the head are not concerned, nor is evaluation. It needs bfloat16, a LoRA
    rank that is a multiple of 8, and an NVIDIA GPU from compute capability 8.9 on (a CPU emulates it). It cannot be
    combined with `mlp` and `self_attn`."""
    start_step: Step = 0.05
    """First sparse optimiser step: a float in [0, 1] is a fraction of the training, an int a number of steps."""
    end_step: Step = 0.75
    """First step of the dense tail, in the same units; 1.0: no tail, as in the published recipes."""
    explain_steps: NonNegative = 50
    """Sparse steps between two records (`sparse-unsloth explain`), 0: none. Of the channel selection: how many channels
    are new, and how much energy they capture of what the best ones would. With `backward_rows`, at the next log line:
    the share of the gradient's energy in the chosen rows, by layer."""
    cosine_steps: NonNegative = 0
    """With `backward_rows`: optimiser steps between two measurements of `sparsity/gradient_cosine`, the cosine of the
    whole trained gradient with the dense one, on one micro-batch; 0: none. Each costs one dense forward and backward
    of that micro-batch more (every 500 steps: less than 0.4 % of the time), and meanwhile a copy of the trained
    gradients. The training stays bitwise the same. It needs a trainer of transformers, and one process."""
    sparse_prefill: Switch = False
    """Whether `for_inference` computes prompts as in training, on selected channels, by the estimator stored beside the
    adapter. Decoded tokens are dense."""
    seed: NonNegative = 3407
    """Seed of the randomised SVD, the calibration inputs and the `random` criterion."""

    @model_validator(mode="before")
    @classmethod
    def _rows_need_no_schedule(cls, data: Any) -> Any:
        if not isinstance(data, Mapping):
            return data
        if data.get("preset") == "rows":
            data = {"backward_rows": BACKWARD_ROWS, **data}
        if data.get("backward_rows", 1) != 1:
            data = {"start_step": 0.0, "end_step": 1.0, **data}
        return data

    @field_validator("mlp", "self_attn")
    @classmethod
    def _auto_leaves_out_no_channels(cls, rules: dict[str, float], info: ValidationInfo) -> dict[str, float]:
        if info.data.get("preset") == "auto" and any(rules.values()):
            raise ValueError("cannot be combined with preset auto, which leaves out no channels; leave the preset out")
        return rules

    @field_validator("backward_rows")
    @classmethod
    def _rows_or_channels(cls, share: float, info: ValidationInfo) -> float:
        rules = [name for name in ("mlp", "self_attn") if any(info.data.get(name, {}).values())]
        if info.data.get("preset") in ("o1", "o2"):
            rules.append(f"preset {info.data['preset']}")
        if share < 1 and rules:
            raise ValueError(
                f"cannot be combined with {' and '.join(rules)}: leave out channels, or rows (1.0: none), not both"
            )
        if share < 1 and info.data.get("dense_tokens") == "none":
            raise ValueError(
                "cannot be combined with dense_tokens: none: answers would be context tokens, and be left out of the "
                "backward pass where their gradients are small, which makes models unlearn; set dense_tokens: output"
            )
        return share

    @field_validator("precision")
    @classmethod
    def _whole_weights(cls, precision: str, info: ValidationInfo) -> str:
        rules = [name for name in ("mlp", "self_attn") if any(info.data.get(name, {}).values())]
        if precision != "bf16" and (rules or info.data.get("preset") in ("o1", "o2")):
            raise ValueError("must be bf16 where channels are left out (mlp, self_attn, preset o1 or o2)")
        if precision == "fp8-context" and info.data.get("backward_rows", 1.0) < 1:
            raise ValueError("must be fp8 or bf16 with backward_rows: fp8-context is for dense training so far")
        return precision

    @field_validator("sparse_prefill")
    @classmethod
    def _means_channels(cls, value: bool, info: ValidationInfo) -> bool:
        if value and info.data.get("backward_rows", 1.0) < 1:
            raise ValueError("must be False with backward_rows, which selects no channels")
        return value

    @field_validator("end_step")
    @classmethod
    def _ends_after_it_starts(cls, end: float | int, info: ValidationInfo) -> float | int:
        start = info.data.get("start_step")
        if end == 1 and isinstance(end, int):
            raise ValueError("must be written 1.0 for the whole training: the int 1 means one optimiser step")
        if type(start) is type(end) and end < start:
            raise ValueError(f"must not be less than start_step ({start})")
        return end

    @property
    def schedule(self) -> Schedule:
        """The schedule: which optimiser steps are sparse."""
        return Schedule(self.start_step, self.end_step)

    @property
    def fp8(self) -> bool:
        """Whether layers multiply by frozen weights in FP8, for some tokens at least."""
        return self.precision != "bf16"

    @property
    def row_sparse(self) -> bool:
        """Whether the training is row-sparse; no channels are selected then."""
        return self.backward_rows < 1

    @property
    def is_auto(self) -> bool:
        """Whether what is not given is decided when training begins."""
        return self.preset == "auto"

    def decided(self, **chosen: Any) -> "SparsityConfig":
        """The configuration of a training under `auto`: what was given by hand, and ``chosen`` for the rest."""
        fields = {**chosen, **self.as_dict()}
        fields["preset"] = "rows" if fields.get("backward_rows", 1.0) < 1 else "dense"
        return type(self)(**fields)

    def as_dict(self) -> dict[str, Any]:
        """Every field as plain data; under `auto` those that were given, for the others are not decided yet."""
        return self.model_dump(mode="json", exclude_unset=self.is_auto)

    def is_sparse(self, num_layers: int) -> bool:
        """Whether any layer of a model with ``num_layers`` decoder layers is sparse.

        Raises:
            ConfigError: see `layer_sparsity`.
        """
        return self.row_sparse or any(map(any, self.layer_sparsity(num_layers)))

    def whole_rows(self) -> "SparsityConfig":
        """The same without `backward_rows` and the schedule that it implies."""
        if not self.row_sparse:
            return self
        changes: dict[str, Any] = {"preset": None, "backward_rows": 1.0}
        if (self.start_step, self.end_step) == (0.0, 1.0):
            changes |= {name: type(self).model_fields[name].default for name in ("start_step", "end_step")}
        return self.model_copy(update=changes)

    def layer_sparsity(self, num_layers: int) -> list[LayerSparsity]:
        """The sparsity of each layer of a model with ``num_layers`` decoder layers.

        A preset is a table of 32 layers, scaled to the model's depth; layer 0 stays dense (docs/how-it-works.md,
        section 4.7).

        Raises:
            ConfigError: rules name layers that the model does not have.
        """
        if num_layers < 1:
            raise ConfigError(f"num_layers: must be at least 1, given {num_layers}")
        problems: list[str] = []
        parts = []
        for part, published in zip(("mlp", "self_attn"), PRESETS[self.preset or "dense"], strict=True):
            table = expand(published, [0.0] * PUBLISHED_LAYERS)
            base = [table[(2 * i + 1) * PUBLISHED_LAYERS // (2 * num_layers)] for i in range(num_layers)]
            base[0] = 0.0
            problems += absent_layers(part, getattr(self, part), num_layers)
            parts.append(expand(getattr(self, part), base))
        if problems:
            raise failure(f"{TITLE} for a model with layers 0 to {num_layers - 1}", problems)
        return [LayerSparsity(*pair) for pair in zip(*parts, strict=True)]

    @classmethod
    def from_any(cls, value: "str | Path | Mapping | SparsityConfig | None") -> "SparsityConfig":
        """The configuration that a user passes as ``sparsity=``.

        Args:
            value: a configuration; a preset's name; the path of a YAML or JSON file (``config.json#o1`` chooses a mode
                of the older JSON format); a mapping in this or an older format; None for the dense configuration.

        Raises:
            ConfigError: the preset or file does not exist, or the contents are wrong.
        """
        if value is None:
            return cls()
        if isinstance(value, cls):
            return value
        if isinstance(value, Mapping):
            return cls._from_mapping(dict(value), TITLE)
        if value is False or (isinstance(value, str) and value.lower() in NOTHING and not Path(value).exists()):
            raise ConfigError(f"{TITLE}: {value!r} is no preset; 'dense' is training without sparsity")
        if not isinstance(value, str | os.PathLike):
            raise ConfigError(f"{TITLE}: must be a preset, a path, a mapping or a SparsityConfig, given {value!r}")
        text = os.fspath(value)
        if text in PRESETS:
            return cls(preset=text)
        if text == "calibrated":
            raise ConfigError(f"{TITLE}: {removed.ONLY_WITH_SAMPLES}")
        path, _, mode = (text, "", "") if Path(text).exists() else text.partition("#")
        if not Path(path).exists() and Path(path).suffix not in SUFFIXES:
            hint = did_you_mean(text, PRESETS)
            raise ConfigError(f"{TITLE}: {text!r} is neither a preset ({', '.join(PRESETS)}) nor a file{hint}")
        return cls.from_file(path, mode=mode or None)

    @classmethod
    def from_file(cls, path: str | os.PathLike, mode: str | None = None) -> "SparsityConfig":
        """Reads a YAML or JSON file (by suffix) in this format or an older public one (`config.legacy`).

        Args:
            path: the file.
            mode: which mode of an older JSON file, such as ``"o1"``; needed when it holds several.

        Raises:
            ConfigError: the file is missing, cannot be parsed, or has wrong contents.
        """
        path = Path(path)
        data = read(path)
        if not isinstance(data, dict):
            what = "is empty" if data is None else f"holds a {type(data).__name__}"
            raise ConfigError(f"{path}: must hold a mapping of SparsityConfig keys, but {what}")
        config = cls._from_mapping(data, str(path), mode=mode, folder=path.parent)
        estimator = config.estimator.path
        if estimator is not None and estimator.endswith(".safetensors") and not os.path.isabs(estimator):
            # A file beside this one has priority, so that their folder can be moved.
            beside = os.path.abspath(path.parent / estimator)
            if os.path.isfile(beside):
                found = config.estimator.model_copy(update={"path": beside})
                config = config.model_copy(update={"estimator": found})
        return config

    def save(self, path: str | os.PathLike) -> None:
        """Writes `as_dict` to a YAML or JSON file (by suffix), atomically; `from_file` restores it exactly.

        Raises:
            ConfigError: another suffix.
        """
        write(Path(path), self.as_dict())

    @classmethod
    def _from_mapping(cls, data: dict, source: str, mode: str | None = None, folder: Path | None = None):
        problems: list[str] = []
        if legacy.recognises(data):
            data, problems = legacy.translate(data, mode, folder)
        elif mode is not None:
            problems = [f"mode: {mode!r} given, but only the older JSON format has modes"]
        return cls._checked(data, source, problems)
