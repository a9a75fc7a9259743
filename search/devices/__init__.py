"""Devices: what runs a packed model and answers with measurements."""

from search.devices.base import Device, DeviceError, Measurement, MeasureRequest
from search.devices.catalog import open_device

__all__ = ["Device", "DeviceError", "MeasureRequest", "Measurement", "open_device"]
