"""The private names of Ray that the pipelines use, each with its reason. No other file of `pipelines/` imports any.

Ray may rename or remove a private name in any version; `serve/ray_internals.py` says what happens then, and has the
names of Ray Serve. Functions here wrap the names of Ray itself. The classes of Ray Train are imported as they are:

    from pipelines.ray_internals import ScalingPolicy

Ray and Ray Train cost seconds to import. Each name is therefore loaded when it is first asked for, so that a command
line that needs the lease does not import Ray Train.
"""

import importlib
import logging
from typing import TYPE_CHECKING, Any

from serve.ray_internals import PrivateName

if TYPE_CHECKING:
    from ray.train.v2._internal.execution.controller.state import ReschedulingState as ReschedulingState
    from ray.train.v2._internal.execution.controller.state import RunningState as RunningState
    from ray.train.v2._internal.execution.failure_handling import FailureDecision as FailureDecision
    from ray.train.v2._internal.execution.failure_handling.default import DefaultFailurePolicy as DefaultFailurePolicy
    from ray.train.v2._internal.execution.scaling_policy import NoopDecision as NoopDecision
    from ray.train.v2._internal.execution.scaling_policy import ResizeDecision as ResizeDecision
    from ray.train.v2._internal.execution.scaling_policy import ScalingDecision as ScalingDecision
    from ray.train.v2._internal.execution.scaling_policy import ScalingPolicy as ScalingPolicy

# Ray itself

KV_GET = PrivateName(
    "ray.experimental.internal_kv",
    "_internal_kv_get",
    "read leases, stop switches and owners of applications; Ray has no public key-value store that outlives a driver",
)
KV_PUT = PrivateName(
    "ray.experimental.internal_kv",
    "_internal_kv_put",
    "write a lease only if no other process has written it; Ray has no public compare-and-set between drivers",
)
KV_DELETE = PrivateName(
    "ray.experimental.internal_kv", "_internal_kv_del", "return leases and remove owners of applications"
)
FREE_RESOURCES = PrivateName(
    "ray._private.state",
    "available_resources_per_node",
    "place training workers by what is free on each node; ray.available_resources() is the sum over all nodes",
)
DRAINING_NODES = PrivateName(
    "ray._private.state",
    "state.get_draining_nodes",
    "checkpoint before a drained node is taken away; Ray Train's public way makes all ranks wait for each other",
)
GLOBAL_WORKER = PrivateName(
    "ray._private.worker",
    "global_worker",
    "read this driver's job submission id; the public runtime context has only Ray's internal job id",
)
USES_OUTWARD_ADDRESS = PrivateName(
    "ray._private.ray_constants",
    "ENABLE_RAY_CLUSTER",
    "keep an imported Ray from replacing 127.0.0.1 by the machine's outward address; it reads the environment once",
)
RAYLET_CONFIG = PrivateName(
    "ray._raylet",
    "Config.initialize",
    "make an imported Ray read its RAY_* variables again, RAY_AUTH_MODE among them",
)
TOKEN_LOADER = PrivateName(
    "ray._raylet",
    "AuthenticationTokenLoader.instance",
    "make an imported Ray forget the token that it read, or did not find, when it was imported",
)

# Ray Train

_STATE = "ray.train.v2._internal.execution.controller.state"
_FAILURES = "ray.train.v2._internal.execution.failure_handling"
_SCALING = "ray.train.v2._internal.execution.scaling_policy"
TRAIN_CLASSES = {
    "RunningState": PrivateName(_STATE, "RunningState", "note which nodes a running worker group occupies"),
    "ReschedulingState": PrivateName(_STATE, "ReschedulingState", "note that a worker group has returned its nodes"),
    "FailureDecision": PrivateName(_FAILURES, "FailureDecision", "end training on an error that would come again"),
    "DefaultFailurePolicy": PrivateName(
        f"{_FAILURES}.default", "DefaultFailurePolicy", "count restarts as Ray Train does, in a subclass of it"
    ),
    "NoopDecision": PrivateName(_SCALING, "NoopDecision", "leave the worker group as it is, or wait for room"),
    "ResizeDecision": PrivateName(_SCALING, "ResizeDecision", "start a worker group of a chosen size"),
    "ScalingDecision": PrivateName(_SCALING, "ScalingDecision", "name the type of a policy's answer"),
    "ScalingPolicy": PrivateName(
        _SCALING, "ScalingPolicy", "choose size and nodes of every worker group, in a subclass of it"
    ),
}
"""Name under which this module offers a class -> the class."""
TRAIN_CONTEXT = PrivateName(
    "ray.train.v2._internal.execution.context",
    "__file__",
    "name the logger that repeats every training report; Ray Train names it by this file",
)
TRAIN_MEMBERS = (
    PrivateName(
        "ray.train.torch",
        "TorchTrainer._initialize_and_run_controller",
        "hand our policies to Ray Train, in an override; no public argument takes one",
    ),
    PrivateName(_SCALING, "ScalingPolicy._maybe_send_resource_request", "ask the autoscaler for the workers' room"),
    PrivateName(
        _SCALING, "ScalingPolicy._get_num_workers_for_resource_request", "say for how many workers, in an override"
    ),
    PrivateName(_SCALING, "ScalingPolicy.after_controller_start", "get the scaling config that the controller uses"),
    PrivateName(_SCALING, "ScalingPolicy.after_controller_state_update", "see a worker group start and end"),
    PrivateName(
        _SCALING,
        "ScalingPolicy.make_decision_for_non_running_worker_group",
        "choose a new group, in an override",
    ),
    PrivateName(
        _SCALING, "ScalingPolicy.make_decision_for_running_worker_group", "let a group grow again, in an override"
    ),
    PrivateName(f"{_FAILURES}.default", "DefaultFailurePolicy.make_decision", "decide on a restart, in an override"),
    PrivateName(
        "ray.train",
        "ScalingConfig._resources_per_worker_not_none",
        "repeat the workers' resources in a decision, with Ray Train's defaults filled in",
    ),
)
"""Members of Ray Train's classes that `training/restarts.py` overrides or calls. Importing the classes does not prove
that the members are there."""

PRIVATE_NAMES = (
    *(KV_GET, KV_PUT, KV_DELETE, FREE_RESOURCES, DRAINING_NODES, GLOBAL_WORKER),
    *(USES_OUTWARD_ADDRESS, RAYLET_CONFIG, TOKEN_LOADER, TRAIN_CONTEXT),
    *TRAIN_CLASSES.values(),
    *TRAIN_MEMBERS,
)


def __getattr__(name: str) -> Any:
    """A class of Ray Train, loaded when it is first imported from here.

    Raises:
        ImportError: the installed Ray does not have the class.
    """
    if name in TRAIN_CLASSES:
        return TRAIN_CLASSES[name].load()
    raise AttributeError(f"module {__name__} has no attribute {name}")


# The key-value store


def kv_get(key: str, namespace: str) -> bytes | None:
    """A value of the cluster's key-value store; None if the key is not there."""
    value: bytes | None = KV_GET.load()(key, namespace=namespace)
    return value


def kv_put(key: str, value: str, *, overwrite: bool, namespace: str) -> None:
    """Set a value of the cluster's key-value store. Without `overwrite` a value that is there stays."""
    KV_PUT.load()(key, value, overwrite=overwrite, namespace=namespace)


def kv_delete(key: str, namespace: str) -> None:
    """Remove a value of the cluster's key-value store. No-op if the key is not there."""
    KV_DELETE.load()(key, namespace=namespace)


# Nodes, this driver, the environment


def available_resources_per_node() -> dict[str, dict[str, float]]:
    """Node id -> Ray's name of a resource -> the amount that no task, actor or placement group holds."""
    found: dict[str, dict[str, float]] = FREE_RESOURCES.load()()
    return found


def draining_nodes() -> set[str]:
    """Ids of the nodes that will be taken away: spot instances with a notice, or `ray drain-node`."""
    return set(DRAINING_NODES.load()())


def job_submission_id() -> str | None:
    """Id of the Ray job submission to which this driver or worker belongs; None if it was not submitted.

    This process must be connected to Ray.
    """
    metadata = GLOBAL_WORKER.load().core_worker.get_job_config().metadata
    return metadata.get("job_submission_id") or None


def stay_on_loopback() -> None:
    """Make a Ray that is already imported heed RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=0 and RAY_AUTH_MODE.

    Ray read both variables while it was imported. The first keeps it from replacing 127.0.0.1 by the machine's outward
    address, where the local cluster does not listen.
    """
    USES_OUTWARD_ADDRESS.load()  # otherwise a renamed constant would be set without effect
    setattr(importlib.import_module(USES_OUTWARD_ADDRESS.module), USES_OUTWARD_ADDRESS.path, False)
    RAYLET_CONFIG.load()("")
    TOKEN_LOADER.load()().reset_cache()


def silence_report_logger() -> None:
    """Drop the log line with which Ray Train repeats every training report in a worker.

    Its logger is named by a file, which Ray's own log level does not reach.
    """
    logging.getLogger(TRAIN_CONTEXT.load()).setLevel(logging.WARNING)
