#!/bin/sh
# What has become of a job, as Snakemake asks for it: running, success or failed.
case "$(squeue --noheader --states=all --job "$1" --format=%T 2>/dev/null)" in
  PENDING | CONFIGURING | RUNNING | SUSPENDED | COMPLETING) echo running ;;
  COMPLETED) echo success ;;
  *) echo failed ;;
esac
