"""From a device's name on the command line to the device."""

from __future__ import annotations

from search.devices.base import Device

FORMS = "local, model:PROFILE, qemu-aarch64[:CPU], ssh://USER@HOST[:PORT], adb://SERIAL, agent://HOST:PORT, ray://RESOURCE/DEVICE"


def open_device(spec: str) -> Device:
    """Raises ValueError for a name of no known form. Nothing is contacted yet, but for `ray://`, which starts its actor there
    and may raise DeviceError."""
    from search.devices.driver import LocalDriver, ProgramDevice
    from search.devices.emulated import EmulatedDevice, QemuDriver
    from search.devices.remote import AdbDriver, SshDriver

    kind, _, rest = spec.partition("://")
    if kind == "ssh" and rest:
        return ProgramDevice(SshDriver(rest))
    if kind == "adb" and rest:
        return ProgramDevice(AdbDriver(rest))
    if kind == "agent" and rest:
        from search.agent.client import AgentDevice

        return AgentDevice(rest)
    if kind == "ray" and rest.partition("/")[2]:
        from search.ray_devices import open_on_ray

        return open_on_ray(*rest.split("/", 1))
    if spec.startswith("model:"):
        from search.devices.modelled import ModelledDevice, load_profile

        return ModelledDevice(load_profile(spec.removeprefix("model:")))
    if spec == "local":
        return ProgramDevice(LocalDriver())
    if spec == "qemu-aarch64" or spec.startswith("qemu-aarch64:"):
        return EmulatedDevice(QemuDriver(spec.partition(":")[2] or "max"))
    raise ValueError(f"device {spec!r}; expected one of {FORMS}")
