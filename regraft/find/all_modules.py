"""Places: every module of a model as a site, also those that neither drop nor are linear.

A rule that inserts something, or that limits weights, may name any module; a rule that grafts may not.
"""

from __future__ import annotations

from regraft.find.recognize import op_of
from regraft.find.site import Site
from regraft.find.ungraftable import own_parameter
from regraft.find.walk import Named
from regraft.record import original_class


def places(modules: list[Named]) -> list[Site]:
    """A site for each module, named by its operation or else by its class; not probed."""
    return [_place(named) for named in modules]


def _place(named: Named) -> Site:
    module, name = named.module, original_class(named.module).__name__
    weight = own_parameter(module, "weight")
    return Site(
        path=named.paths[0],
        paths=tuple(named.paths),
        kind="module",
        op=op_of(module) or name,
        type=name,
        p=None,
        calls=None,
        source=None,
        family=None,
        module=module,
        device=None if weight is None else str(weight.device),
        dtype=None if weight is None else str(weight.dtype).removeprefix("torch."),
        training=module.training,
    )
