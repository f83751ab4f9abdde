"""S3 by boto3: addresses, objects with checksums and retries, and how a run is published."""
