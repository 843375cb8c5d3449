"""The private names of Ray Serve that this project uses, each with its reason. No other file of `serve/` uses any.

Ray may rename or remove a private name in any version. `PrivateName.load` then raises an error that says what the name
is needed for, and `tests/test_ray_internals.py` loads every name. For a new version of Ray: run that test, mend what it
names, and write the new version into `RAY_VERSION`. `pipelines/ray_internals.py` has the names outside of Ray Serve.
"""

import importlib
from dataclasses import dataclass
from typing import Any

RAY_VERSION = "2.60.0"
"""The version of Ray in which every private name was last checked."""


@dataclass(frozen=True, slots=True)
class PrivateName:
    """A name inside Ray that is not part of its public API."""

    module: str
    """Module to import."""
    path: str
    """Attribute of the module, or a dotted path to an attribute of a class in the module."""
    purpose: str
    """What this project uses the name for, as the end of "It is needed to ..."."""
    ray_version: str = RAY_VERSION
    """The version of Ray in which the name was last checked."""

    def load(self) -> Any:
        """Import the module and return the attribute.

        Raises:
            ImportError: the installed Ray does not have the name.
        """
        try:
            value: Any = importlib.import_module(self.module)
            for part in self.path.split("."):
                value = getattr(value, part)
        except (ImportError, AttributeError) as error:
            ray_version = importlib.import_module("ray").__version__
            raise ImportError(
                f"Ray {ray_version} has no {self.module}.{self.path} ({error}). It is needed to {self.purpose}. "
                f"Install Ray {self.ray_version}, in which it was last checked, or adapt ray_internals.py"
            ) from error
        return value


GET_CLIENT = PrivateName(
    "ray.serve.context",
    "_get_global_client",
    "find out whether Serve runs without starting it; the public serve.status() has neither routes nor HTTP options",
)
SET_CLIENT = PrivateName(
    "ray.serve.context",
    "_set_global_client",
    "drop this process's handle of a Serve controller that another process has shut down",
)
GET_DETAILS = PrivateName(
    "ray.serve._private.client",
    "ServeControllerClient.get_serve_details",
    "read the applications' routes, replicas and times of deployment, and the address on which the proxy listens",
)
ADD_PORT = PrivateName(
    "ray.serve._private.replica",
    "add_port_to_grpc_server",
    "bind a replica's own port to loopback; Serve binds it to every address and has no setting for it",
)
PRIVATE_NAMES = (GET_CLIENT, SET_CLIENT, GET_DETAILS, ADD_PORT)


def serve_details() -> dict[str, Any] | None:
    """The Serve controller's description of itself and of its applications; None if Serve does not run.

    Raises:
        ray.exceptions.RayActorError: the controller restarts.
    """
    client = GET_CLIENT.load()(raise_if_no_controller_running=False)
    return None if client is None else dict(client.get_serve_details())


def forget_controller() -> None:
    """Drop this process's handle of the Serve controller. The next call looks the controller up by its name."""
    SET_CLIENT.load()(None)


def keep_replica_on_loopback() -> None:
    """Bind Serve's own port of this replica, for calls between deployments, to loopback.

    Call it in the constructor of a deployment: Serve binds the port right after the constructor.
    """
    bind = ADD_PORT.load()
    replica: Any = importlib.import_module(ADD_PORT.module)
    replica.add_port_to_grpc_server = lambda server, address: bind(server, address.replace("[::]", "127.0.0.1"))
