"""What can go wrong. A fault strikes at once and returns what makes it good again, with the seconds until then."""

import os
import random
import shutil
import signal
from collections.abc import Callable
from contextlib import suppress

import psutil
import redis

from tests.chaos.world import World

Healing = tuple[float, Callable[[], object]]
Fault = Callable[[World, random.Random], Healing | None]
"""A fault; it returns ``None`` if there was nothing to strike."""
BRIEF, LONG = (1 / 30, 1 / 4), (7 / 6, 10 / 6)
"""The lengths of outages, as multiples of a lease: some are shorter than a lease, and some are longer."""


def kill_worker(world: World, dice: random.Random) -> Healing | None:
    return _kill(world, dice, dice.choice(world.workers))


def kill_api(world: World, dice: random.Random) -> Healing | None:
    return _kill(world, dice, "api")


def kill_scheduler(world: World, dice: random.Random) -> Healing | None:
    return _kill(world, dice, "scheduler")


def kill_database(world: World, dice: random.Random) -> Healing | None:
    return _kill(world, dice, "postgres")


def kill_broker(world: World, dice: random.Random) -> Healing | None:
    return _kill(world, dice, "valkey")


def kill_machine(world: World, dice: random.Random) -> Healing | None:
    """End the machine of a worker; with an object store its disk is lost, and another machine takes its place."""
    name = dice.choice(world.workers)
    if not world.roles[name].wanted:
        return None
    world.kill_family(name)
    if world.storage:
        shutil.rmtree(world.data_of(name), ignore_errors=True)
    return dice.uniform(0.0, 3.0), lambda: world.start(name)


def kill_all_machines(world: World, dice: random.Random) -> Healing | None:
    """End everything at once, as a power cut does; the disks stay."""
    names = [name for name, role in world.roles.items() if role.wanted]
    for name in reversed(names):
        world.kill_family(name)

    def start_again() -> None:
        for name in names:
            world.start(name)

    return dice.uniform(0.0, 3.0), start_again


def restart_worker(world: World, dice: random.Random) -> Healing | None:
    return _restart(world, dice, dice.choice(world.workers))


def restart_api(world: World, dice: random.Random) -> Healing | None:
    return _restart(world, dice, "api")


def restart_scheduler(world: World, dice: random.Random) -> Healing | None:
    return _restart(world, dice, "scheduler")


def restart_database(world: World, dice: random.Random) -> Healing | None:
    return _restart(world, dice, "postgres")


def kill_runner(world: World, dice: random.Random) -> Healing | None:
    return _kill_child(world, dice, "tests.chaos.witness")


def kill_publisher(world: World, dice: random.Random) -> Healing | None:
    return _kill_child(world, dice, "publisher")


def kill_supervisor(world: World, dice: random.Random) -> Healing | None:
    """Kill the forked process of a worker that supervises the job."""
    return _kill_child(world, dice, "tests.chaos.worker")


def freeze_worker(world: World, dice: random.Random) -> Healing | None:
    return _freeze(world, world.family(dice.choice(world.workers)), dice)


def freeze_supervisor(world: World, dice: random.Random) -> Healing | None:
    return _freeze(world, world.children(dice.choice(world.workers), "tests.chaos.worker"), dice)


def freeze_runner(world: World, dice: random.Random) -> Healing | None:
    return _freeze(world, world.children(dice.choice(world.workers), "tests.chaos.witness"), dice)


def freeze_publisher(world: World, dice: random.Random) -> Healing | None:
    return _freeze(world, [child for name in world.workers for child in world.children(name, "publisher")], dice)


def freeze_api(world: World, dice: random.Random) -> Healing | None:
    return _freeze(world, world.family("api"), dice)


def freeze_scheduler(world: World, dice: random.Random) -> Healing | None:
    return _freeze(world, world.family("scheduler"), dice)


def freeze_database(world: World, dice: random.Random) -> Healing | None:
    return _freeze(world, world.family("postgres"), dice)


def freeze_broker(world: World, dice: random.Random) -> Healing | None:
    return _freeze(world, world.family("valkey"), dice)


def wipe_broker(world: World, dice: random.Random) -> Healing | None:
    try:
        with redis.Redis.from_url(world.broker_url, socket_timeout=2) as broker:
            broker.flushall()
    except redis.RedisError:
        return None
    return 0.0, lambda: None


def cut_worker_from_database(world: World, dice: random.Random) -> Healing | None:
    proxy = world.proxies[dice.choice(world.workers)]
    proxy.cut()
    return _seconds(world, dice), proxy.mend


def fill_disk(world: World, dice: random.Random) -> Healing | None:
    """Fill the disk, but only if the data folder is a file system of its own."""
    if not os.path.ismount(world.data):
        return None
    ballast = world.data / "ballast"
    with suppress(OSError), ballast.open("wb") as file:
        for size in (2**20, 2**12, 1):
            with suppress(OSError):
                for _ in range(shutil.disk_usage(world.data).free // size + 1):
                    file.write(b"\0" * size)
                    file.flush()
    return dice.uniform(0.5, 4.0), lambda: ballast.unlink(missing_ok=True)


def slow_hub(world: World, dice: random.Random) -> Healing | None:
    world.hub.delay = dice.uniform(0.5, 3.0)
    return dice.uniform(2.0, 6.0), lambda: setattr(world.hub, "delay", 0.0)


def failing_hub(world: World, dice: random.Random) -> Healing | None:
    world.hub.broken = True
    return dice.uniform(1.0, 6.0), lambda: setattr(world.hub, "broken", False)


def mute_hub(world: World, dice: random.Random) -> Healing | None:
    """Make the Hub do what it is asked, and drop its answer."""
    world.hub.mute = True
    return dice.uniform(1.0, 6.0), lambda: setattr(world.hub, "mute", False)


FAULTS: dict[Fault, int] = {
    kill_worker: 5,
    kill_machine: 5,
    kill_all_machines: 2,
    kill_runner: 4,
    kill_publisher: 4,
    kill_supervisor: 3,
    kill_api: 2,
    kill_scheduler: 2,
    kill_database: 3,
    kill_broker: 2,
    restart_worker: 3,
    restart_api: 1,
    restart_scheduler: 1,
    restart_database: 1,
    freeze_worker: 3,
    freeze_supervisor: 3,
    freeze_runner: 3,
    freeze_publisher: 3,
    freeze_api: 1,
    freeze_scheduler: 1,
    freeze_database: 2,
    freeze_broker: 1,
    wipe_broker: 3,
    cut_worker_from_database: 4,
    fill_disk: 3,
    slow_hub: 2,
    failing_hub: 2,
    mute_hub: 4,
}
"""The faults, each with its weight in the draw."""


def _seconds(world: World, dice: random.Random) -> float:
    return world.lease * dice.uniform(*dice.choice((BRIEF, LONG)))


def _kill(world: World, dice: random.Random, name: str) -> Healing | None:
    if not world.roles[name].wanted:
        return None
    world.kill(name)
    return dice.uniform(0.0, 3.0), lambda: world.start(name)


def _restart(world: World, dice: random.Random, name: str) -> Healing | None:
    if not world.roles[name].wanted:
        return None
    world.stop(name)
    return dice.uniform(0.0, 1.0), lambda: world.start(name)


def _kill_child(world: World, dice: random.Random, module: str) -> Healing | None:
    found = [child for name in world.workers for child in world.children(name, module)]
    if not found:
        return None
    with suppress(psutil.NoSuchProcess):
        dice.choice(found).kill()
    return 0.0, lambda: None


def _freeze(world: World, processes: list[psutil.Process], dice: random.Random) -> Healing | None:
    if not processes:
        return None

    def signal_all(number: int) -> None:
        for process in processes:
            with suppress(psutil.NoSuchProcess):
                process.send_signal(number)

    signal_all(signal.SIGSTOP)
    return _seconds(world, dice), lambda: signal_all(signal.SIGCONT)
