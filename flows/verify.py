"""verify: choose → read → record. A share of the stored backups is read again; what is not whole is a failed run."""

from typing import Annotated, Any

from prefect import flow, get_run_logger, task
from prefect.client.schemas.objects import State
from prefect.states import Failed
from pydantic import Field

from flows import artifact, policy
from flows.core import configuration, control_plane, objects
from flows.missed import superseded
from shared import verify as core
from shared.receipt import Receipt
from shared.verify import Examined, Share

_LISTED = 200


class Looked(Receipt, frozen=True):
    """One value, so that Prefect does not look into thousands."""

    examined: list[Examined]


@task(name="choose", **policy.READ)
def choose(limit: int | None) -> Share:
    return core.choose(control_plane(), configuration(), limit)


@task(name="read", **policy.ONCE)
def read(share: Share) -> Looked:
    """Retries are inside: a bad one is looked at twice."""
    progress = artifact.Progress("verify-progress", f"{len(share.backups)} of {share.available} backups")
    return Looked(core.examine_all(control_plane(), objects(), configuration(), share, progress=progress.show))


@task(name="record", **policy.READ)
def record(looked: Looked) -> Looked:
    """Each was recorded as it was read, but for those that PostgreSQL did not take then."""
    for one in looked.examined:
        if one.outcome != "good":
            get_run_logger().error("%s is %s: %s", one.backup.key, one.outcome, one.cause)
    return Looked([one if one.recorded else core.record(control_plane(), one) for one in looked.examined])


@flow(name="verify", flow_run_name="verify", **policy.FLOW)
def verify(
    limit: Annotated[int, Field(ge=1, le=1_000_000)] | None = None,
) -> dict[str, Any] | State[dict[str, Any]]:
    """Read stored backups again, those not read for longest first: sha256, decryption, and SQLite's own checks.

    Args:
        limit: How many. None takes the share of a day, so that all are read within ENGRAM_VERIFY_CYCLE_DAYS.
    """
    if (missed := superseded()) is not None:
        return missed
    share = choose(limit)
    examined = record(read(share)).examined
    bad = [e for e in examined if e.outcome in ("corrupt", "missing") and e.backup.status == "available"]
    known = [e for e in examined if e.outcome in ("corrupt", "missing") and e.backup.status != "available"]
    unread = [e for e in examined if e.outcome == "inconclusive"]
    left = len(share.backups) - len(examined)
    again = sorted({e.backup.tenant_id for e in bad})
    artifact.report(
        "verify",
        "Verify",
        f"{sum(e.outcome == 'good' for e in examined)} of {len(share.backups)} backups are whole, {len(bad)} are not, "
        f"{len(unread)} could not be read",
        {
            "available in all": share.available,
            "left to the next run": left,
            "found corrupt by earlier runs": len(known),
            "bytes read": sum(e.backup.stored_bytes for e in examined if e.outcome != "inconclusive"),
            "to do now": f"engram backup {' '.join(again[:20])}" if again else None,
        },
        artifact.table(
            ("tenant", "backup", "taken at", "outcome", "cause"),
            [(e.backup.tenant_id, e.backup.key, e.backup.ts, e.outcome, e.cause) for e in (*bad, *unread, *known)][
                :_LISTED
            ],
        ),
    )
    result = {
        "available": share.available,
        "examined": len(examined),
        "left": left,
        "backup_now": again,
        "bad": [_dict(e) for e in bad],
        "inconclusive": [_dict(e) for e in unread],
    }
    if bad or unread:
        causes = "; ".join(f"{e.backup.key} is {e.outcome}: {e.cause}" for e in [*bad, *unread][:5])
        return Failed(message=f"{len(bad)} corrupt or missing, {len(unread)} inconclusive: {causes}", data=result)
    return result


def _dict(examined: Examined) -> dict[str, Any]:
    backup = examined.backup
    return {
        "backup_id": str(backup.backup_id),
        "tenant_id": backup.tenant_id,
        "key": backup.key,
        "outcome": examined.outcome,
        "cause": examined.cause,
    }
