"""The plumbing: spreads ``rlsparse`` over a cluster with Ray and keeps MLflow up to date."""
