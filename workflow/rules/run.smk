# One run at a time in a folder. Snakemake's own lock, which the profile turns off, outlives a process that is killed.
# Not in a module: handlers do not run there, shell.prefix would change the jobs of the workflow around it, and unless
# that one turns it off, Snakemake's lock holds.

import shlex
from uuid import uuid4

from snakemake.settings.types import DeploymentMethod
from snakemake_interface_executor_plugins.settings import ExecMode

from stepdown.plan.environments import check_conda, check_this_python
from stepdown.plan.locks import join_run, start_run

if DeploymentMethod.CONDA in workflow.deployment_settings.deployment_method:
    with one_line():
        check_conda()

if workflow.exec_mode == ExecMode.DEFAULT:
    os.environ["STEPDOWN_RUN"] = uuid4().hex
else:
    # This Snakemake runs one job of a run, maybe long after that was interrupted.
    with one_line():
        join_run(os.environ.get("STEPDOWN_RUN", "no run"))


# Schedulers hand it on to the jobs.
envvars:
    "STEPDOWN_RUN",


# Not before: planning, linting and reporting change nothing, and may go on beside a run.
onstart:
    with one_line():
        if not workflow.deployment_settings.deployment_method:
            check_this_python()
        start_run(os.environ["STEPDOWN_RUN"])


shell.prefix(f"set -euo pipefail; source {shlex.quote(str(SCRIPTS / 'begin_job.sh'))}; ")
