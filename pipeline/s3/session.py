"""boto3's client for S3, by settings and by AWS's own variables and files."""

from __future__ import annotations

import logging
import os
from typing import Any

import boto3
from botocore.config import Config

from pipeline.s3.errors import translated
from pipeline.settings.storage import StorageSettings


def make_client(settings: StorageSettings) -> Any:
    """boto3's S3 client by these settings, and by AWS's variables and files for what they leave out."""
    # At level DEBUG these log the headers of requests: session tokens and signatures.
    for name in ("boto3", "botocore", "s3transfer"):
        logger = logging.getLogger(name)
        logger.setLevel(max(logger.level, logging.WARNING))
    with translated("opening a session", f"s3://{settings.bucket or ''}", settings.endpoint_url or "AWS"):
        session = boto3.session.Session(
            profile_name=settings.profile,
            # boto3 itself reads AWS_DEFAULT_REGION alone.
            region_name=settings.region or os.environ.get("AWS_REGION") or None,
        )
        config = Config(
            retries={"mode": "standard", "total_max_attempts": settings.attempts},
            connect_timeout=settings.timeout_seconds,
            read_timeout=settings.timeout_seconds,
            max_pool_connections=2 * settings.workers + 2,
            user_agent_appid="coalora",
        )
        return session.client("s3", endpoint_url=settings.endpoint_url, config=config)
