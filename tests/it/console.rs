//! The page for approvers at the real broker: with an HTTP client, and with headless Chromium.

mod browser;
mod forms;
mod in_browser;
mod pages;
mod screens;
mod session_end;
mod sign_in;
mod sign_in_limits;
mod sign_in_rates;
mod site;
