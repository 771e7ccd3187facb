"""The operations: public function and dispatcher registration, one file each."""
