"""The object store: where it is, whose credentials, how long and how often it is tried."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, Field, SecretStr


class Objects(BaseModel):
    """`shared/objects.py`, `shared/s3.py`."""

    object_store_url: str = ""
    s3_endpoint: str = ""
    s3_region: str = "auto"
    s3_checksum: Literal["sha256", "none"] = Field(
        default="sha256", description="sent with every upload for the store to compare; none: it refuses the header"
    )
    s3_access_key_id: str = ""
    s3_secret_access_key: SecretStr = SecretStr("")
    # Credentials of a single role, so that nobody holds more than they need; empty: the ones above.
    s3_read_access_key_id: str = Field(default="", description="gets and lists: restores, restore tests, verification")
    s3_read_secret_access_key: SecretStr = SecretStr("")
    s3_delete_access_key_id: str = Field(default="", description="lists and deletes: retention, deletion of a tenant")
    s3_delete_secret_access_key: SecretStr = SecretStr("")
    object_store_timeout_seconds: float = Field(
        default=60.0, gt=0, description="of one request; a larger object is read on from where it stopped"
    )
    object_store_connect_timeout_seconds: float = Field(default=5.0, gt=0)
    object_store_retries: int = Field(default=4, ge=0)
    object_store_retry_timeout_seconds: float = Field(default=60.0, gt=0)
    object_store_read_back: bool = Field(
        default=True, description="download what was uploaded to S3; false trusts the store's check of s3_checksum"
    )
    object_store_single_put_bytes: int = Field(
        default=16_777_216, ge=0, le=5_000_000_000, description="one conditional request up to here, parts above"
    )
    object_store_part_bytes: int = Field(default=8_388_608, ge=5_242_880, description="all but the last are equal")
