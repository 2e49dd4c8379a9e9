"""What a training has in common with others that go on beside it."""

from __future__ import annotations

from collections.abc import Callable

from kdrun.assembly import Assembly
from kdrun.data.loader import Loader
from kdrun.distiller import Distiller
from kdrun.lockstep import Member
from kdrun.method import Method
from kdrun.shared_pass import FollowingLoader, SharedPass
from kdrun.stages.recorded import computing_dtype
from kdrun.stages.stage import Context


def share_pass(
    member: Member,
    context: Context,
    assembly: Assembly,
    distiller: Distiller,
    loader: Loader,
    make_loader: Callable[[tuple[str, ...]], Loader],
    alike: tuple[int, ...],
) -> Loader:
    """Let a training that is about to begin take its batches and teachers from the shared pass.

    Its own frozen networks are given up; those of whoever came first serve all.

    Args:
        member: the run among the others.
        context: the run.
        assembly: its method and networks.
        distiller: its training, on the device.
        loader: of its own.
        make_loader: gives such a loader with the views that are asked for.
        alike: equal for loaders that give the same samples in the same order.

    Returns:
        The loader to train from.
    """
    views = assembly.method.views
    # Data may depend on the seed, and are then another object, or change in the course of a stage.
    key = (member.stage, context.data, context.data.fingerprint, *alike)
    shared = member.share(key, lambda: SharedPass(make_loader))
    shared.join(views)
    for role in list(distiller.frozen):
        source = assembly.method.roles()[role]
        name = f"{source} {context.artefacts[source].name}"
        own = distiller.frozen[role].to(computing_dtype(context))
        network = shared.network(name, own, context.task)
        distiller.let_stand_in(role, network.stand_in(assembly.taps.get(role), views))
        assembly.teachers[role] = network.network
    return FollowingLoader(member, shared, loader)


def why_apart(method: Method) -> str | None:
    """Why a method cannot share its teachers with runs beside it; None: it can."""
    if method.irregular:
        return "runs its networks in steps of its own"
    if method.unlabelled:
        return "learns from samples without labels too"
    if type(method).augment is not Method.augment:
        return "changes the batches that networks see"
    if not set(method.roles()) - set(method.trainable_roles):
        return "has no frozen teacher to share"
    return None
