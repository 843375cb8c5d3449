"""Errors of the pipelines that are not a config's (`ConfigError`) or an artefact's (`ArtefactError`)."""


class ClusterError(RuntimeError):
    """A Ray cluster cannot do what was asked. The message gives the reason and the way out."""


class RunStopped(Exception):
    """Training was asked to stop and ended before its last step. Its newest checkpoint holds every finished step."""
