#!/usr/bin/env bash
# Waits for AWS's notice that this spot machine will be taken back, then has Ray drain it. Started on each worker.
set -uo pipefail
metadata=${METADATA_URL:-http://169.254.169.254}
while :; do
  token=$(curl -sf -m 2 -X PUT -H "X-aws-ec2-metadata-token-ttl-seconds: 60" "$metadata/latest/api/token")
  if curl -sf -m 2 -H "X-aws-ec2-metadata-token: $token" "$metadata/latest/meta-data/spot/instance-action"; then
    exec ray drain-node --reason DRAIN_NODE_REASON_PREEMPTION --reason-message "spot notice" \
      --deadline-remaining-seconds 110
  fi
  sleep 5
done
