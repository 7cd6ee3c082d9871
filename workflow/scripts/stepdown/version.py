"""The version, apart from what scripts import: a release alone reruns nothing."""

__version__ = "0.1.0"
