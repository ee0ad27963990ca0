// A deadline that calls itself a fence.
// error: law 2: an event claims to prove what its party cannot know
#include "loan.hpp"
namespace loan {
struct Timer {
  static constexpr std::string_view name = "Tick";
#ifdef MUST_NOT_COMPILE
  static constexpr EventFacts facts{.party = Party::ledger, .guard = Guard::overdue, .proof = Proof::fenced};
#else
  static constexpr EventFacts facts{.party = Party::ledger, .guard = Guard::cut_off, .proof = Proof::fenced};
#endif
};
inline constexpr auto more = rows_and<Read, Timer, Over>();
static_assert(lawful<Loan<more, Read, Timer>>());
}  // namespace loan
