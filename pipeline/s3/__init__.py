"""Objects in S3 by boto3: addresses, one client, and errors that say what to do."""
