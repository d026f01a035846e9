"""What a gateway with two reactors costs while its guests are idle: the second reactor and the balancer's timer."""

from contextlib import ExitStack
from functools import partial

from ringstone.bench.gateway import EngineProcess
from ringstone.bench.process import cpu_share
from ringstone.bench.rest import VOLUMES, attach_idle, connected
from ringstone.bench.results import Results, Row
from ringstone.bench.setting import Setting
from ringstone.bench.spread import Bar, interleave


def idle(setting: Setting, results: Results) -> None:
    """One reactor and two, each with volumes attached and a connected frontend for each, watched in turn."""
    section = f"idle, {VOLUMES} attached volumes with an idle frontend each"
    seconds = setting.plan.window.seconds
    with ExitStack() as stack:
        engines = []
        cores = [setting.cores.server, setting.cores.client]
        for count in (1, 2):
            directory = setting.directory / f"idle{count}"
            directory.mkdir()
            engine = stack.enter_context(EngineProcess(directory, cores[:count]))
            names = [f"idle{index}" for index in range(VOLUMES)]
            for name in names:
                attach_idle(engine, name, directory)
            stack.enter_context(connected([engine.socket_of(name) for name in names]))
            engines.append(engine)
        watch = [partial(cpu_share, engine.pid, seconds) for engine in engines]
        shares: list[list[float]] = [[], []]
        for turn, index, share in interleave(setting.plan.rounds, watch):
            shares[index].append(share * 100)
            setting.progress(f"idle: round {turn + 1}/{setting.plan.rounds}: {share:.2%} of a core")
    results.keep_raw(
        section, "one reactor, two reactors", {}, [{"percent_of_a_core": each} for each in shares]
    )
    results.rows.append(
        Row.beside(
            section,
            "CPU of an idle gateway with two reactors",
            "% of a core",
            shares[1],
            ("one reactor", shares[0]),
            f"CPU time of the whole process in windows of {seconds:g} s; the balancer looks at both",
            Bar("at most 1 % of a core", at_most=1.0),
            judge="figure",
        )
    )
