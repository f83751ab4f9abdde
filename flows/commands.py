"""The pipeline's commands, which `coalora.cli` adds to its own in a checkout.

Each reads its arguments and hands them to a plain function; what is slow to import is imported after the arguments, and
after the settings of a run, were found good.
"""

from pathlib import Path
from typing import Annotated, Any

import typer

from coalora.cli import Command, hooks, log_to_terminal
from coalora.errors import CoaloraError

DEFAULT_FILE = "pipelines.yaml"

Name = Annotated[str, typer.Argument(metavar="NAME", help="Pipeline, as defined in the file.")]
File = Annotated[Path, typer.Option(metavar="YAML", help="File of pipelines.")]
Changes = Annotated[
    list[str], typer.Option("--set", metavar="SECTION.KEY=VALUE ...", help="Change settings; values are YAML.")
]
Refresh = Annotated[list[str], typer.Option(metavar="STAGE ...", help="Compute these stages again whatever is cached.")]
Run = Annotated[Path, typer.Argument(metavar="RUN", help="Run folder, such as runs/demo/latest.")]
Endpoint = Annotated[str | None, typer.Option(metavar="URL", help="S3 server; by default AWS_ENDPOINT_URL, else AWS.")]
Region = Annotated[str | None, typer.Option(metavar="NAME", help="Region; by default AWS_REGION or the profile's.")]
Profile = Annotated[
    str | None, typer.Option(metavar="NAME", help="Profile of ~/.aws with the credentials; by default AWS_PROFILE.")
]
Published = Annotated[str, typer.Argument(metavar="s3://BUCKET/PREFIX/runs/PIPELINE/RUN", help="RUN may be `latest`.")]


def add_to(app: typer.Typer) -> None:
    """Add the commands to a command line, in the order in which `--help` shows them."""
    for command in (run, stage, dvc, score, devices, upload, download, restore, prune):
        app.command(command.__name__, cls=Command)(command)
    hooks.update(open="pipeline.sources:open_address", refuse=f"{__name__}:outside_of_home")


def run(name: Name, file: File = Path(DEFAULT_FILE), changes: Changes = [], refresh: Refresh = []) -> None:  # noqa: B006
    """Run a pipeline, from a base model to registered adapters.

    A second run does no work; a run that was killed goes on behind its last finished stage.
    """
    settings = _settings(name, file, changes)
    from flows.main import run_pipeline

    run_pipeline(name, settings, refresh)


def stage(
    part: Annotated[str, typer.Argument(metavar="PART", help="What to bring up to date.")],
    name: Name,
    file: File = Path(DEFAULT_FILE),
    changes: Changes = [],  # noqa: B006
    refresh: Refresh = [],  # noqa: B006
) -> None:
    """Run one part of a pipeline, for `dvc repro`.

    Without a server; what it makes is copied to outputs/.
    """
    settings = _settings(name, file, changes)
    log_to_terminal()
    from flows.parts import INPUTS, recall, write_inputs

    if part == INPUTS:
        write_inputs(name, settings)
    elif refresh or not recall(part, name, settings):
        from flows.stage import run_stage

        run_stage(part, name, settings, refresh)


def dvc(check: Annotated[bool, typer.Option("--check", help="Compare only; 2 where it differs.")] = False) -> None:
    """Write dvc.yaml from the stage graph."""
    from flows.stage import write_dvc_yaml

    write_dvc_yaml(check=check)


def score(
    run: Run,
    text: Annotated[list[Path], typer.Option(metavar="FILE ...", help="Text files in UTF-8, each one document.")],
    budget: Annotated[
        list[str], typer.Option(metavar="BUDGET ...", help="At most, as for adapt: average bits a weight.")
    ],
    max_length: Annotated[int | None, typer.Option(help="Tokens a window; by default the benchmark's blocks.")] = None,
    stride: Annotated[int | None, typer.Option(help="Tokens from window to window; by default no overlap.")] = None,
    json: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the numbers to this file, too.")] = None,
) -> None:
    """Measure a run on any text, at any budgets.

    Each (text, budget) is kept in the store: asking again costs nothing.
    """
    log_to_terminal()
    outside_of_home(json)
    from flows.finished import score_run

    print(score_run(run, text, budget, max_length, stride, json))


def devices(
    source: Annotated[
        str, typer.Argument(metavar="SOURCE", help="Run folder, bundle, s3://... or models:/NAME@ALIAS.")
    ],
    device: Annotated[list[str], typer.Option(metavar="NAME|YAML ...", help="Profiles of devices.")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder for the pairs.")] = Path("devices"),
    publish: Annotated[str | None, typer.Option(metavar="s3://BUCKET/PREFIX", help="Upload them there.")] = None,
) -> None:
    """Write base and adapter for each of many devices.

    As the Prefect flow `devices`, which a deployment runs whenever the champion moves.
    """
    outside_of_home(out)
    from coalora.export.profile import DeviceProfile

    for name in device:
        DeviceProfile.load(name)
    from flows.devices import run_devices

    print(run_devices(source, device, str(out), publish))


def upload(
    run: Run,
    to: Annotated[
        str | None, typer.Option(metavar="s3://BUCKET/PREFIX", help="By default storage.bucket of the run's settings.")
    ] = None,
    endpoint_url: Endpoint = None,
    region: Region = None,
    profile: Profile = None,
    expire_uploads: Annotated[
        bool,
        typer.Option("--expire-uploads", help="Let the bucket free uploads that were killed, by a rule of its own."),
    ] = False,
) -> None:
    """Publish a finished run in S3.

    Adapters, packed bases, bundle and report; only what is not there is sent.
    """
    log_to_terminal()
    from pipeline.sources import read_run

    settings, _ = read_run(run)
    storage = _storage(settings.storage, endpoint_url, region, profile, at=to)
    if storage.bucket is None:
        raise CoaloraError("No bucket to publish in is named", remedy="Give --to s3://BUCKET/PREFIX")

    from coalora.files import read_json
    from pipeline.s3.client import S3Location
    from pipeline.store.publish import publish
    from pipeline.tracking.registry import tag_address

    location = S3Location.of(storage)
    if expire_uploads:
        print(location.expire_uploads())
    found = publish(run, location)
    print(f"{found.address}: {found.summary}")
    run_id = read_json(run / "run.json").get("mlflow_run_id")
    for version in tag_address(settings.tracking, run_id, found.address) if run_id else []:
        print(f"registered model {version}: tagged with this address")


def download(
    address: Published,
    out: Annotated[Path, typer.Option(metavar="DIR", help="New or empty folder, or an earlier download.")],
    only: Annotated[
        list[str], typer.Option(metavar="PATTERN ...", help="Paths such as 'export/3-bits/*'; by default all.")
    ] = [],  # noqa: B006
    endpoint_url: Endpoint = None,
    region: Region = None,
    profile: Profile = None,
) -> None:
    """Download a published run, or a part of it.

    Every file is verified; an interrupted download goes on with the files that are missing.
    """
    log_to_terminal()
    outside_of_home(out)
    from pipeline.s3.client import S3Address

    place, storage = S3Address.parse(address), _storage(None, endpoint_url, region, profile)
    from pipeline.store.publish import retrieve

    found = retrieve(place, out, storage, only=only)
    print(
        f"{out}: run {found.run}, {found.n_files} files, {found.nbytes:,} bytes, all verified; "
        f"{found.fetched_files} fetched, the others were there"
    )


def restore(
    out: Annotated[Path, typer.Option(metavar="FILE", help="File to write.")],
    mlflow_run: Annotated[
        str | None, typer.Option(metavar="ID", help="MLflow run of a pipeline, or of one of its rounds.")
    ] = None,
    rev: Annotated[
        str | None,
        typer.Option(metavar="GITREV", help="Commit, branch, tag or experiment; by default files as they are."),
    ] = None,
    pipeline: Annotated[str | None, typer.Option(metavar="NAME", help="Where DVC has sets of several.")] = None,
    round: Annotated[int | None, typer.Option(metavar="N", help="Round; by default the last.")] = None,
    tracking_uri: Annotated[
        str | None, typer.Option(metavar="URI", help="MLflow's server or database; by default this checkout's.")
    ] = None,
) -> None:
    """Bring a round's configuration set back.

    From DVC or MLflow, as a file that another run can start with.
    """
    if mlflow_run and rev:
        raise CoaloraError("--mlflow-run and --rev name two sources", remedy="Give one of them")
    log_to_terminal()
    outside_of_home(out)
    from pipeline.tracking.server import place_of_runs, require_server
    from pipeline.versioning.restoring import from_dvc, from_mlflow, write_new

    if out.is_dir() or any(parent.is_file() for parent in out.absolute().parents):
        raise CoaloraError(f"{out} is a folder, or lies below a file", remedy="Name another file with --out")

    if mlflow_run:
        uri = place_of_runs(tracking_uri)
        require_server(uri, existing=True)
        found = from_mlflow(mlflow_run, round, tracking_uri=uri, root=Path.cwd())
    else:
        found = from_dvc(Path.cwd(), rev=rev, pipeline=pipeline, round_index=round)
    write_new(out, found.content)
    bits = [member["average_bits"] for member in found.members]
    print(
        f"{out}: {len(bits)} configurations of round {found.round_index}, {min(bits):.3f} to {max(bits):.3f} "
        f"average bits, from {found.source}\nstart a run with it: --set initial_set.file={out}"
    )


def prune(
    delete: Annotated[bool, typer.Option("--delete", "--yes", help="Remove it; without, nothing is touched.")] = False,
    older_than: Annotated[
        float, typer.Option(metavar="DAYS", help="Keep what was made or used in the last DAYS.")
    ] = 7.0,
    root: Annotated[Path, typer.Option(metavar="DIR", help="Checkout with runs/ and configurations/.")] = Path("."),
    tracking_uri: Annotated[
        list[str], typer.Option(metavar="URI ...", help="More MLflow servers or databases to ask.")
    ] = [],  # noqa: B006
    at: Annotated[
        str | None, typer.Option(metavar="s3://BUCKET/PREFIX", help="Free this place in S3 instead of this machine.")
    ] = None,
    withdraw: Annotated[
        list[str], typer.Option(metavar="PIPELINE/RUN ...", help="With --at: these published runs go, too.")
    ] = [],  # noqa: B006
    endpoint_url: Endpoint = None,
    region: Region = None,
    profile: Profile = None,
) -> None:
    """Show or remove what nothing refers to.

    Kept: everything that a run folder under runs/, a run or registered version in MLflow, or a configuration set under
    DVC refers to, with all stages of these runs; what a run uses that is under way; and what was made or used lately.
    In S3 published runs stay as well.
    """
    if withdraw and not at:
        raise CoaloraError("--withdraw names published runs, and no place", remedy="Give --at s3://BUCKET/PREFIX")
    if not 0 <= older_than < 1e6:
        raise CoaloraError(f"--older-than is {older_than:g}", remedy="Give a number of days, 0 or more")
    if not root.is_dir():
        raise CoaloraError(f"--root {root} is no folder", remedy="Name the checkout with runs/ and configurations/")
    from flows.prune import prune_bucket, prune_store
    from pipeline.tracking.server import require_server

    for uri in tracking_uri:
        if not uri.startswith("http"):  # a server that is away is told with what it means for pruning
            require_server(uri, existing=True)
    if at:
        storage = _storage(None, endpoint_url, region, profile, at=at)
        prune_bucket(storage, root.resolve(), tracking_uri, withdraw, days=older_than, delete=delete)
    else:
        prune_store(root.resolve(), tracking_uri, days=older_than, delete=delete)


def outside_of_home(out: Path | None) -> None:
    """Refuse to write among what is kept: a file more in an artifact makes it another one."""
    from pipeline.environment import coalora_home

    if out is not None and out.resolve().is_relative_to(coalora_home()):
        raise CoaloraError(f"{out} lies in {coalora_home()}, where the store is", remedy="Name another place")


def _settings(name: str, file: Path, changes: list[str]) -> Any:
    from pipeline.settings.definitions import load_settings

    return load_settings(name, file=file, changes=changes)


def _storage(
    base: Any, endpoint_url: str | None, region: str | None, profile: str | None, *, at: str | None = None
) -> Any:
    """`base`, or what AWS's own variables and files say, with the given options in place of its own values."""
    from pipeline.settings.sections import storage_settings

    given = {"endpoint_url": endpoint_url, "region": region, "profile": profile}
    if at:
        from pipeline.s3.client import S3Address

        address = S3Address.parse(at)
        given |= {"bucket": address.bucket, "prefix": address.prefix}
    return storage_settings(base, {name: value for name, value in given.items() if value is not None})
