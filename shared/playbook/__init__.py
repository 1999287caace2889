"""The incident playbook: fast actions with one implementation behind three doors (command line, admin API, Prefect).

`action` (what an action, a request for one and its outcome are) · `table` (all of them, by name) · `perform` (the one
way to carry one out: judge, record, do, verify, record) · `autonomy` (who may do what without a person; pure) ·
`audit` (the table `actions`) · and one module for what each action is about: `limit`, `workers`, `jwks`, `token`,
`volume`, `permissions` (with `file_tree`), `restore`, `busiest`.
"""
