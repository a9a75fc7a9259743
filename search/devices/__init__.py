"""Devices: what runs a packed model and answers with measurements."""

from search.devices.base import BadOutput, Device, DeviceCrash, DeviceError, DeviceTimeout, Measurement, MeasureRequest
from search.devices.catalog import open_device

__all__ = ["BadOutput", "Device", "DeviceCrash", "DeviceError", "DeviceTimeout", "MeasureRequest", "Measurement",
           "open_device"]  # fmt: skip
