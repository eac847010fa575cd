//! The change of a request for approval within a transaction.

use crate::{ApprovalChange, Error, rows, session::Session, statements::Statements};

/// Changes the state of a request, in the transaction of the change that it permits.
pub(super) async fn change(
    session: &mut impl Session,
    sql: &'static Statements,
    change: &ApprovalChange,
) -> Result<(), Error> {
    let mut values = rows::approval_values(&change.row);
    values.extend([change.row.id.into(), (&change.expected).into()]);
    match session.execute(sql.change_approval, values).await? {
        1 => Ok(()),
        _ => Err(Error::Conflict),
    }
}
