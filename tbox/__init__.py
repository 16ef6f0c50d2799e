"""The telematics control unit of an electric vehicle. Imports nothing: a command loads what it needs."""

__version__ = "0.1.0"
