"""Checks of a whole configuration that need no GPU and no other process."""

from __future__ import annotations

from operator import attrgetter
from pathlib import Path

from imdm_scale.config.architecture import SIZES, architecture_of
from imdm_scale.config.layout import RoleLayout, run_layout
from imdm_scale.config.model_folder import LATEST, is_hub_name, may_hold_model, missing_files
from imdm_scale.config.nearest import either, near_files, nearest_numbers
from imdm_scale.config.ranges import check_ranges
from imdm_scale.config.tree import Config
from imdm_scale.errors import UserError

EMBEDDED_TEACHER_SIZE = "tiny"
"""Size of the teacher that ships with the package."""


def check_config(config: Config, world_size: int) -> None:
    """Refuses a configuration that cannot run on `world_size` processes.

    Raises:
        UserError: the first setting found that does not fit, with what would.
    """
    check_layout(config, world_size)
    _check_method(config)
    _check_evaluation(config)
    _check_data(config)
    _check_paths(config)


def check_layout(config: Config, world_size: int) -> None:
    """Refuses a network that cannot be built, or not be laid out on `world_size` processes; looks at no file.

    Raises:
        UserError: the first setting found that does not fit, with what would.
    """
    check_ranges(config)
    _check_network(config)
    layout = run_layout(config, world_size, zero_stage=0)  # no layout is refused for the student's stage
    for role in layout.roles:
        _check_batches(config, role)
    if layout.placement == "disaggregated" and config.teacher.prefetch == 0:
        raise UserError(
            "teacher.prefetch is 0, but with teacher.placement disaggregated the teacher must work at least 1 "
            "update ahead; set it to 1 or more."
        )


def _check_method(config: Config) -> None:
    method = config.method
    if method.name == "im_redi" and config.data.path is None:
        raise UserError(
            "method.name is im_redi, which learns from pairs that a teacher made, but data.path is null; make them "
            "with tools/generate_pairs.py, then set data.path to their folder and train.init_from to the teacher's."
        )
    if method.fresh_noise and method.name != "im_redi":
        raise UserError(
            f"method.fresh_noise is true, but method.name is {method.name}, whose noise is always drawn anew; leave it "
            "out, or set method.name=im_redi."
        )
    if not method.has_teacher:
        if config.teacher.path is not None:
            raise UserError(
                f"teacher.path is {config.teacher.path}, but method.name is {method.name}, which has no teacher; "
                "leave teacher.path null (train.init_from starts from given weights)."
            )
        if method.states != "data":
            raise UserError(
                f"method.states is {method.states}, but method.name is {method.name}, which learns from "
                "data; set it to data."
            )
        return
    if config.train.init_from is not None:
        raise UserError(
            f"train.init_from is {config.train.init_from}, but with method.name {method.name} the student "
            "starts as a copy of the teacher; name the weights in teacher.path."
        )
    if method.name != "coupled" and method.vocabulary_order != "identity":
        raise UserError(
            f"method.vocabulary_order is {method.vocabulary_order}, but method.name is {method.name}, and only coupled "
            "ties tokens to the noise in an order; leave method.vocabulary_order out, or set method.name=coupled."
        )
    if method.name == "coupled" and architecture_of(config, vocab_size=1, mask_token_id=0).noise_dim < 2:
        setting = "num_masks" if config.model.num_masks else "noise_dim"
        raise UserError(
            "method.name is coupled, whose tokens and times are read from the first two dimensions of the noise, but "
            f"model.{setting} is {getattr(config.model, setting)}; "
            f"{'set it to 0' if config.model.num_masks else 'set it to 2 or more'}."
        )
    if method.min_steps > method.initial_steps:
        raise UserError(
            f"method.min_steps is {method.min_steps}, more than method.initial_steps, which is "
            f"{method.initial_steps}, so that no round could begin; set it to {method.initial_steps} or less."
        )
    if config.teacher.path is None:
        shape = architecture_of(config, vocab_size=1, mask_token_id=0)
        given = {name: getattr(shape, name) for name in ("hidden_size", "num_layers", "num_heads")}
        embedded = {name: SIZES[EMBEDDED_TEACHER_SIZE][name] for name in given}
        if given != embedded:
            raise UserError(
                f"model.size is {config.model.size} ({_listed(given)}), but teacher.path is null and "
                f"the packaged teacher has size {EMBEDDED_TEACHER_SIZE} ({_listed(embedded)}); set "
                f"model.size={EMBEDDED_TEACHER_SIZE}, or teacher.path to a teacher of the student's shape."
            )


def _check_network(config: Config) -> None:
    shape = architecture_of(config, vocab_size=1, mask_token_id=0)
    hidden, heads = shape.hidden_size, shape.num_heads
    if hidden % heads or shape.head_dim % 2:
        fitting = [n for n in range(1, hidden + 1) if hidden % n == 0 and hidden // n % 2 == 0]
        remedy = (
            f"set model.num_heads to {nearest_numbers(fitting, heads)}"
            if fitting
            else "choose an even model.hidden_size"
        )
        raise UserError(
            f"model.hidden_size {hidden} over model.num_heads {heads} gives heads of width "
            f"{hidden / heads:g}, but the rotary embedding needs an even whole number; {remedy}."
        )
    if config.model.num_masks == 1:
        raise UserError(
            "model.num_masks is 1, but a single mask is that of a plain masked diffusion model; set model.num_masks to "
            "2 or more, or model.num_masks=0 and model.noise_dim=0 for the plain model."
        )
    if config.model.num_masks and config.model.noise_dim not in (None, 1):
        raise UserError(
            f"model.num_masks is {config.model.num_masks} and model.noise_dim is {config.model.noise_dim}, but masks "
            "are either so many or noise of so many dimensions; leave one of the two out."
        )
    if shape.noise_fourier and shape.noise_dim < 2:
        raise UserError(
            f"model.noise_fourier is {shape.noise_fourier}, but model.noise_dim is {shape.noise_dim}, and the Fourier "
            "features are those of the noise's first two dimensions (which token, and when); set model.noise_dim to "
            "2 or more, or model.noise_fourier=0."
        )


def _check_batches(config: Config, role: RoleLayout) -> None:
    whole, unit = config.train.global_batch_size, role.micro_batch_size * role.dp
    if whole % unit:
        fitting = sorted({max(whole // unit, 1) * unit, (whole // unit + 1) * unit})
        own = role.role == "teacher" and config.teacher.micro_batch_size is not None
        micro = "teacher.micro_batch_size" if own else "train.micro_batch_size"
        raise UserError(
            f"train.global_batch_size is {whole}, which is no multiple of {micro} {role.micro_batch_size} x the "
            f"{role.role}'s data-parallel size {role.dp} = {unit}; set it to {either(fitting)}, or change {micro}."
        )
    if role.virtual_stages == 1:
        return
    count, key = whole // unit, f"parallel.{role.role}.virtual_stages"
    if count % role.pp:
        raise UserError(
            f"{key} is {role.virtual_stages}, which needs as many micro-batches as a multiple of "
            f"parallel.{role.role}.pp, {role.pp}, but an update has {count} on each replica; change "
            f"train.global_batch_size or the micro-batch size, or set {key}=1."
        )
    if config.evaluate.batch_size % role.pp:
        raise UserError(
            f"evaluate.batch_size is {config.evaluate.batch_size}, but {key} is {role.virtual_stages}, for which "
            f"it must be a multiple of parallel.{role.role}.pp, {role.pp}; change it, or set {key}=1."
        )


def _check_evaluation(config: Config) -> None:
    evaluate = config.evaluate
    if not evaluate.steps or min(evaluate.steps) < 1 or len(set(evaluate.steps)) < len(evaluate.steps):
        raise UserError(
            f"evaluate.steps is {evaluate.steps}, but must be a list of different positive numbers, such as "
            "[1,4,16]."
        )
    if evaluate.shown_samples > evaluate.num_samples:
        raise UserError(
            f"evaluate.shown_samples is {evaluate.shown_samples}, more than evaluate.num_samples, "
            f"{evaluate.num_samples}; set it to {evaluate.num_samples} or less."
        )
    if evaluate.at_end and evaluate.shown_steps not in evaluate.steps:
        raise UserError(
            f"evaluate.shown_steps is {evaluate.shown_steps}, but texts are sampled in {either(evaluate.steps)} steps; "
            "set it to one of these."
        )


def _check_data(config: Config) -> None:
    data = config.data
    paths = data.path if isinstance(data.path, list) else [data.path]
    if not paths:
        raise UserError(
            "data.path is an empty list; name a corpus, or set it to null for the packaged books."
        )
    if data.weights is not None and len(data.weights) != len(paths):
        raise UserError(
            f"data.weights has {len(data.weights)} numbers ({data.weights}), but data.path names {len(paths)} "
            "corpora; give one weight for each, or leave data.weights out to mix by size."
        )
    for path in paths:
        if path is not None and "://" not in path and not Path(path).exists():
            raise UserError(f"data.path is {path}, which does not exist; {near_files(Path(path))}")


def _check_paths(config: Config) -> None:
    if config.resume not in (None, LATEST) and not Path(config.resume).exists():
        raise UserError(f"resume is {config.resume}, which does not exist; {near_files(Path(config.resume))}")
    for key in ("tokenizer.path", "teacher.path", "train.init_from", "data.continue_from"):
        given = attrgetter(key)(config)
        if given is None:
            continue
        path, is_model = Path(given), key in ("teacher.path", "train.init_from")
        if not path.exists() and not (is_model and is_hub_name(given)):
            raise UserError(f"{key} is {given}, which does not exist; {near_files(path)}")
        if is_model and path.exists() and not may_hold_model(path):
            raise UserError(
                f"{key} is {given}, which holds no {' and no '.join(missing_files(path))}; name a folder that "
                "holds a model's config.json and its weights, model.safetensors or several files with an index; or a "
                "run's folder or a checkpoint; or a model on the hub."
            )
    if Path(config.run_dir).exists() and not Path(config.run_dir).is_dir():
        raise UserError(
            f"run_dir is {config.run_dir}, which is a file; name a folder, which is made if need be."
        )


def _listed(shape: dict[str, int]) -> str:
    return ", ".join(f"{name} {value}" for name, value in shape.items())
