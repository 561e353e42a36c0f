"""The table of calls (docs/wire-protocol.md), and the small ones themselves."""

from __future__ import annotations

import asyncio
import os
import time
from functools import cache, partial
from typing import Any

from hypervisor.version import __version__

from . import attach, publish, setup, stats, template, wire
from .engine import Engine
from .errors import conflict, invalid
from .events import Subscriber
from .exec import run_exec
from .fields import Fields
from .reaper import Reaper
from .server import Calls, Connection
from .spec import parse_name, parse_resources, parse_spec
from .volumes import Volumes
from .wire import FrameType


class Agent:
    """What the calls work on."""

    def __init__(self, reaper: Reaper) -> None:
        volumes = Volumes()
        self.engine = Engine(reaper, volumes)
        self.setup = setup.Setup(volumes)
        self.power_off = False
        self.stopping = False

    def ready(self) -> Engine:
        """The engine, once the guest is set up.

        :raises AgentError: Conflict
        """
        if not self.setup.done:
            raise conflict("the guest is not set up yet; call setup first")
        if self.stopping:
            raise conflict("the guest is shutting down")
        return self.engine


def table(agent: Agent, on_shutdown: Any) -> Calls:
    """Every call by its name. `on_shutdown` is a function that ends the agent's main loop."""
    calls = Calls()
    calls.unary = {
        "hello": partial(_hello, agent),
        "rehearse": partial(_rehearse, agent),
        "setup": partial(_setup, agent),
        "clock": partial(_clock, agent),
        "renew": partial(_renew, agent),
        "volume.write": partial(_volume_write, agent),
        "container.start": partial(_start, agent),
        "container.signal": partial(_signal, agent),
        "container.stop": partial(_stop, agent),
        "container.remove": partial(_remove, agent),
        "container.list": partial(_list, agent),
        "container.update": partial(_update, agent),
        "container.pause": partial(_freeze, agent, True),
        "container.resume": partial(_freeze, agent, False),
        "container.stats": partial(_stats, agent),
        "probe": partial(_probe, agent),
        "shutdown": partial(_shutdown, agent, on_shutdown),
    }
    calls.streaming = {
        "events": partial(_events, agent),
        "exec": partial(_exec, agent),
        "attach": partial(_attach, agent),
        "debug": partial(_debug, agent),
        "logs": partial(_logs, agent),
        "logs.archive": partial(_logs_archive, agent),
        "archive.get": partial(_archive_get, agent),
        "archive.put": partial(_archive_put, agent),
        "dial": partial(_dial, agent),
    }
    return calls


# ---- the guest -------------------------------------------------------------------------------------------------------


async def _hello(agent: Agent, args: dict[str, Any]) -> dict[str, Any]:
    Fields(args, "hello").done()
    return {
        "wire": wire.VERSION,
        "agent": __version__,
        "kernel": os.uname().release,
        "boot_id": _boot_id(agent),
        "uptime_s": time.clock_gettime(time.CLOCK_BOOTTIME),
        "clock_ns": time.time_ns(),
    }


def _boot_id(agent: Agent) -> str:
    """The kernel makes it when it is first read, which in a clone must not be before `setup` has brought entropy of its
    own: until then clones of one template have the same random numbers, and would have the same id for ever.
    """
    if not agent.setup.done and template.wanted():
        return ""
    return _read_boot_id()


@cache
def _read_boot_id() -> str:
    with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as f:
        return f.read().strip()


async def _setup(agent: Agent, args: dict[str, Any]) -> dict[str, Any]:
    settings = setup.parse(args)
    await agent.setup.run(settings)
    agent.engine.hostname = settings.hostname
    if settings.share_process_namespace:
        await agent.engine.share_processes()
    return {"clock_ns": time.time_ns()}


async def _clock(agent: Agent, args: dict[str, Any]) -> dict[str, Any]:
    fields = Fields(args, "clock")
    add_ns = fields.integer("add_ns", 0, low=-(2**62), high=2**62)
    fields.done()
    agent.ready()
    try:
        setup.shift_clock(add_ns)
    except (OSError, OverflowError) as e:
        raise invalid(f"clock.add_ns: {add_ns}: the clock cannot be moved so far: {e}") from e
    return {"clock_ns": time.time_ns()}


async def _renew(agent: Agent, args: dict[str, Any]) -> dict[str, Any]:
    settings = setup.parse(args)
    agent.ready()
    agent.setup.renew(settings)
    agent.engine.hostname = settings.hostname
    return {"clock_ns": time.time_ns()}


async def _rehearse(agent: Agent, args: dict[str, Any]) -> dict[str, Any]:
    fields = Fields(args, "rehearse")
    data_disk = fields.text("data_disk", None, limit=20)
    fields.done()
    if agent.setup.done or not template.wanted():
        raise conflict("rehearse: only a clone that has not been set up yet can rehearse")
    await template.rehearse(agent, data_disk)
    return {}


async def _shutdown(agent: Agent, on_shutdown: Any, args: dict[str, Any]) -> dict[str, Any]:
    fields = Fields(args, "shutdown")
    grace_s = fields.seconds("grace_s", 10.0)
    fields.done()
    agent.stopping = True
    await agent.engine.stop_all(grace_s)
    on_shutdown()
    return {}


async def _volume_write(agent: Agent, args: dict[str, Any]) -> dict[str, Any]:
    fields = Fields(args, "volume.write")
    volume = agent.ready().volumes.get(parse_name(fields))
    files = publish.parse_files(fields)
    fields.done()
    await asyncio.to_thread(publish.publish, volume.path, files, volume.spec.group)
    return {}


# ---- containers ------------------------------------------------------------------------------------------------------


async def _start(agent: Agent, args: dict[str, Any]) -> dict[str, Any]:
    container = await agent.ready().start(parse_spec(args))
    return {"pid": container.pid, "started_ns": container.started_ns, "attempt": container.attempt}


async def _signal(agent: Agent, args: dict[str, Any]) -> dict[str, Any]:
    fields = Fields(args, "container.signal")
    name, number = parse_name(fields), fields.integer("signal", low=1, high=64)
    everybody = fields.flag("all")
    fields.done()
    agent.ready().signal(name, number, everybody)
    return {}


async def _stop(agent: Agent, args: dict[str, Any]) -> dict[str, Any]:
    fields = Fields(args, "container.stop")
    name, grace_s = parse_name(fields), fields.seconds("grace_s", 10.0)
    fields.done()
    container = await agent.ready().stop(name, grace_s)
    return {"exit_code": container.exit_code, "signal": container.signal}


async def _remove(agent: Agent, args: dict[str, Any]) -> dict[str, Any]:
    fields = Fields(args, "container.remove")
    name = parse_name(fields)
    fields.done()
    await agent.ready().remove(name)
    return {}


async def _list(agent: Agent, args: dict[str, Any]) -> dict[str, Any]:
    Fields(args, "container.list").done()
    return {"containers": agent.engine.as_json()}


async def _update(agent: Agent, args: dict[str, Any]) -> dict[str, Any]:
    fields = Fields(args, "container.update")
    name, resources = parse_name(fields), parse_resources(fields.object("resources"))
    fields.done()
    agent.ready().update(name, resources)
    return {}


async def _freeze(agent: Agent, frozen: bool, args: dict[str, Any]) -> dict[str, Any]:
    fields = Fields(args, "container.pause" if frozen else "container.resume")
    name = parse_name(fields)
    fields.done()
    await agent.ready().freeze(name, frozen)
    return {}


async def _stats(agent: Agent, args: dict[str, Any]) -> dict[str, Any]:
    Fields(args, "container.stats").done()
    engine = agent.ready()
    return await stats.collect(engine.containers, engine.volumes)


async def _probe(agent: Agent, args: dict[str, Any]) -> dict[str, Any]:
    from . import probe

    return await probe.run_probe(args, agent.ready())


# ---- streams ---------------------------------------------------------------------------------------------------------


async def _events(agent: Agent, args: dict[str, Any], connection: Connection) -> None:
    Fields(args, "events").done()
    hub = agent.engine.hub
    subscriber = Subscriber()
    hub.subscribers.add(subscriber)
    try:
        connection.accept({})
        connection.consume(_nothing_more)
        connection.send_json(FrameType.EVENT, {"type": "snapshot", "containers": agent.engine.as_json()})
        while (event := await subscriber.get()) is not None:
            room = connection.send_json(FrameType.EVENT, event)
            if room is not None:
                await room
        connection.end(error={"reason": "ResourceExhausted", "message": "events: this listener fell too far behind"})
    finally:
        hub.subscribers.discard(subscriber)


def _nothing_more(frame: wire.Frame) -> None:
    raise invalid(f"{frame.type.name} frame in a call that takes none")


async def _exec(agent: Agent, args: dict[str, Any], connection: Connection) -> None:
    await run_exec(args, connection, agent.ready(), agent.engine.reaper)


async def _debug(agent: Agent, args: dict[str, Any], connection: Connection) -> None:
    from . import debug

    await debug.run_debug(args, connection, agent.engine.reaper)


async def _attach(agent: Agent, args: dict[str, Any], connection: Connection) -> None:
    await attach.run_attach(args, connection, agent.ready())


async def _logs(agent: Agent, args: dict[str, Any], connection: Connection) -> None:
    await attach.run_logs(args, connection, agent.engine)


async def _logs_archive(agent: Agent, args: dict[str, Any], connection: Connection) -> None:
    await attach.run_logs_archive(args, connection, agent.engine)


async def _archive_get(agent: Agent, args: dict[str, Any], connection: Connection) -> None:
    from . import archive

    await archive.run_get(args, connection, agent.ready())


async def _archive_put(agent: Agent, args: dict[str, Any], connection: Connection) -> None:
    from . import archive

    await archive.run_put(args, connection, agent.ready())


async def _dial(agent: Agent, args: dict[str, Any], connection: Connection) -> None:
    from . import dial

    agent.ready()
    await dial.run_dial(args, connection)
