# What every job's shell does first.

# It shares the lock of its run's jobs: file 9 is open in all that it starts, so the lock lasts until the last of it ends.
exec 9<.snakemake/stepdown/jobs
python -c 'import fcntl; fcntl.flock(9, fcntl.LOCK_SH)'
# A job that begins after its run was killed, and another has begun, must not touch what that one writes.
if ! grep --quiet --no-messages "$STEPDOWN_RUN" .snakemake/stepdown/run; then
  echo "error: this job belongs to a run that was interrupted: nothing is done" >&2
  exit 1
fi

# A job that Snakemake gives one thread, as it does under -j1, may have the machine: much of a job's time is not parallel.
if [ "$OMP_NUM_THREADS" = 1 ]; then
  unset OMP_NUM_THREADS MKL_NUM_THREADS OPENBLAS_NUM_THREADS
fi
